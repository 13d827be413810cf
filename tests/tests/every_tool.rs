//! What every program does alike.

use nix::fcntl::{Flock, FlockArg};
use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use tempfile::TempDir;
use wb_tests::{Outcome, bin, cache_bytes, golden, run, zeros};

/// A program, how it is given a cache device, and its exit code for one that it cannot work on.
struct Tool {
    name: &'static str,
    before: &'static [&'static str],
    after: &'static [&'static str],
    refusal: i32,
}

const TOOLS: [Tool; 6] = [
    Tool { name: "wbformat", before: &[], after: &[], refusal: 1 },
    Tool { name: "wbcheck", before: &[], after: &[], refusal: 8 },
    Tool { name: "wbdump", before: &["super"], after: &[], refusal: 1 },
    Tool { name: "wbdump", before: &["segments"], after: &[], refusal: 1 },
    Tool { name: "wbdump", before: &["segment"], after: &["1"], refusal: 1 },
    Tool { name: "wbdump", before: &["block"], after: &["1"], refusal: 1 },
];

impl Tool {
    fn run(&self, cache: &Path) -> Outcome {
        let before = self.before.iter().map(OsString::from);
        let after = self.after.iter().map(OsString::from);
        run(self.name, before.chain([cache.into()]).chain(after))
    }

    /// Runs it on something that it must refuse, with one line that names the device and says `why`.
    fn refuses(&self, cache: &Path, why: &str) {
        let outcome = self.run(cache);
        assert_eq!(outcome.code, self.refusal, "{} {:?}: {outcome:?}", self.name, self.before);
        assert!(outcome.stdout.is_empty(), "{outcome:?}");
        assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
        assert!(outcome.stderr.starts_with(&format!("{}: ", self.name)), "{outcome:?}");
        assert!(outcome.stderr.contains(why), "{why:?} is not in {outcome:?}");
        assert!(outcome.stderr.contains(&*cache.to_string_lossy()), "{outcome:?}");
    }
}

#[test]
fn help_and_version_are_printed() {
    for tool in &TOOLS {
        let help = run(tool.name, ["--help"]);
        assert_eq!(help.code, 0);
        assert!(help.stdout.contains("Usage:") && help.stderr.is_empty(), "{help:?}");
        let version = run(tool.name, ["--version"]);
        assert_eq!((version.code, version.stdout.starts_with(tool.name)), (0, true), "{version:?}");
        let verb = run(tool.name, tool.before.iter().chain(&["--help"]));
        assert!(verb.code == 0 && verb.stdout.contains("CACHE"), "{verb:?}");
    }
}

#[test]
fn a_senseless_command_line_is_a_usage_error() {
    for tool in &TOOLS {
        assert_eq!(run(tool.name, tool.before).code, 2);
        assert_eq!(run(tool.name, tool.before.iter().chain(&["--no-such-option", "x"])).code, 2);
    }
    assert_eq!(run("wbdump", ["segment", "x", "0"]).code, 2);
    assert_eq!(run("wbdump", ["segment", "x", "-1"]).code, 2);
    assert_eq!(run("wbdump", ["block", "x", "18446744073709551615"]).code, 2);
    assert_eq!(run("wbcheck", ["x", "--segment", "72057594037927937"]).code, 2);
    assert_eq!(run("wbdump", ["no-such-verb", "x"]).code, 2);
}

#[test]
fn a_missing_file_is_named() {
    for tool in &TOOLS {
        tool.refuses(Path::new("/no/such/file"), "cannot open: No such file or directory");
    }
}

#[test]
fn a_directory_and_a_character_device_are_no_devices() {
    for tool in &TOOLS {
        tool.refuses(Path::new("/tmp"), "neither a block device nor a regular file");
        tool.refuses(Path::new("/dev/null"), "neither a block device nor a regular file");
    }
}

#[test]
fn a_file_too_small_for_a_cache_is_refused_with_the_size_it_needs() {
    let dir = TempDir::new().unwrap();
    for bytes in [0, 512, 1 << 20, cache_bytes(1) - 512] {
        let file = zeros(&dir, "small", bytes);
        for tool in &TOOLS {
            tool.refuses(&file, &format!("too small for a cache device: {bytes} bytes"));
        }
    }
}

#[test]
fn a_size_that_is_no_multiple_of_a_sector_is_refused() {
    let dir = TempDir::new().unwrap();
    let file = zeros(&dir, "odd", cache_bytes(3) + 100);
    for tool in &TOOLS {
        tool.refuses(&file, "no multiple of 512; was it truncated?");
    }
}

#[test]
fn a_device_that_another_program_holds_is_left_alone_or_read_with_a_warning() {
    let pair = golden("fresh");
    let file = File::open(&pair.cache).unwrap();
    let _held = Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap();
    for tool in &TOOLS {
        if tool.name != "wbdump" {
            tool.refuses(&pair.cache, "in use");
            continue;
        }
        let outcome = tool.run(&pair.cache);
        assert!(outcome.stderr.starts_with("wbdump: warning: "), "{outcome:?}");
        assert!(outcome.stderr.contains("is in use"), "{outcome:?}");
        let there_is_nothing_to_show = tool.before == ["segment"];
        assert_eq!(outcome.code, i32::from(there_is_nothing_to_show), "{outcome:?}");
    }
}

#[test]
fn a_reader_that_goes_away_early_is_no_error() {
    let pair = golden("lapped-1");
    let cache = pair.cache.to_str().unwrap();
    for command in [
        format!("{} segments {cache}", bin("wbdump").display()),
        format!("{} block {cache} 0 --data", bin("wbdump").display()),
        format!("{} {cache}", bin("wbcheck").display()),
        format!("{} --help", bin("wbcheck").display()),
    ] {
        let script = format!("set -o pipefail; {command} | true");
        let output = assert_cmd::Command::new("bash").args(["-c", &script]).output().unwrap();
        assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{command}: {output:?}");
    }
}

#[test]
fn a_full_disk_under_the_output_is_an_error() {
    let pair = golden("few-1");
    let script = format!("{} segments {} > /dev/full", bin("wbdump").display(), pair.cache.display());
    let output = assert_cmd::Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}
