//! What every program does alike.

use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tempfile::TempDir;
use wb_tests::{
    Outcome, Volume, bin, cache_bytes, flip_bit, golden, needs_serving, run, segment_offset, wb,
    zeros,
};

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

    /// Runs it on something that it must refuse, with one line that names the device and says
    /// `why`.
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
        assert_eq!(
            (output.status.code(), output.stderr.len()),
            (Some(0), 0),
            "{command}: {output:?}"
        );
    }
}

#[test]
fn a_full_disk_under_the_output_is_an_error() {
    let pair = golden("few-1");
    let script =
        format!("{} segments {} > /dev/full", bin("wbdump").display(), pair.cache.display());
    let output = assert_cmd::Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

/// The names of all members of a value, and of what is in it.
fn names(json: &Value, found: &mut BTreeSet<String>) {
    match json {
        Value::Object(members) => {
            for (name, value) in members {
                found.insert(name.clone());
                names(value, found);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| names(value, found)),
        _ => {}
    }
}

/// Programs whose commands the manual describes one by one.
const COMMANDS: [(&str, &[&str]); 2] = [
    ("wbctl", &["status", "list", "get", "replay", "upgrade", "import"]),
    ("wbdump", &["super", "segments", "segment", "blocks", "block"]),
];

/// The lines of the manual about the JSON that a command prints. These are the lines before the
/// first command, and those below each line that names this command.
fn page_of(program: &str, command: &str) -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../manual/src/{program}.roff"));
    let page = std::fs::read_to_string(page).expect("what is written of a program");
    let end =
        page.find(".SH JSON OUTPUT").and_then(|at| Some(at + 1 + page[at + 1..].find("\n.SH ")?));
    let (_, commands) =
        COMMANDS.into_iter().find(|(name, _)| *name == program).unwrap_or(("", &[]));
    let mut text = String::new();
    let (mut counts, mut is_heading) = (true, false);
    for line in page[..end.expect("a section about JSON")].lines() {
        let words = line.strip_prefix(".BR ").or(line.strip_prefix(".B ")).unwrap_or_default();
        let words: Vec<&str> =
            words.split([' ', '"']).filter(|word| !["", "and"].contains(word)).collect();
        if is_heading && !words.is_empty() && words.iter().all(|word| commands.contains(word)) {
            counts = words.contains(&command);
        }
        is_heading = line == ".PP";
        if counts {
            text += line;
            text += "\n";
        }
    }
    text
}

/// Checks that the manual of a program has a word for each member of the JSON that a command of it
/// has printed.
fn is_documented(program: &str, command: &str, outcome: &Outcome) {
    let page = page_of(program, command);
    let words: BTreeSet<&str> =
        page.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
    let mut found = BTreeSet::new();
    for line in outcome.stdout.lines() {
        names(&serde_json::from_str(line).expect("a line of JSON"), &mut found);
    }
    assert!(!found.is_empty(), "{outcome:?}");
    let missing: Vec<_> = found.iter().filter(|name| !words.contains(name.as_str())).collect();
    assert!(missing.is_empty(), "{missing:?} of {command} --json is not in {program}.roff");
}

/// Checks as [`is_documented`], and that each member that the manual names of the command is there.
fn is_as_documented(program: &str, command: &str, outcome: &Outcome) {
    is_documented(program, command, outcome);
    let page = page_of(program, command);
    let json = page.split_once(".SH JSON OUTPUT").expect("a section about JSON").1;
    let is_there = |name: &str| outcome.stdout.contains(&format!("\"{name}\":"));
    let named = json.lines().zip(json.lines().skip(1)).filter(|(above, _)| *above == ".TP");
    let named = named.filter_map(|(_, line)| line.strip_prefix(".BR "));
    let named: Vec<&str> =
        named.flat_map(|line| line.split([' ', '"', ','])).filter(|w| !w.is_empty()).collect();
    assert!(named.len() > 3, "{named:?} of {program} {command}");
    let missing: Vec<_> = named.iter().filter(|name| !is_there(name)).collect();
    assert!(
        missing.is_empty(),
        "{missing:?} of {program}.roff is not in {command} --json: {outcome:?}"
    );
}

#[test]
fn the_manual_tells_of_each_member_of_the_json() {
    let dir = TempDir::new().unwrap();
    let new = zeros(&dir, "new", cache_bytes(3));
    is_documented("wbformat", "", &wb!("wbformat", "--json", &new));
    is_as_documented("wbdump", "super", &wb!("wbdump", "super", "--json", &new));
    let pair = golden("few-1");
    let block =
        wb!("wbdump", "segment", "--json", &pair.cache, "7").json()["metablocks"][0]["block"]
            .to_string();
    is_documented("wbdump", "segment", &wb!("wbdump", "segment", "--json", &pair.cache, "7"));
    is_as_documented("wbdump", "segments", &wb!("wbdump", "segments", "--json", &pair.cache));
    is_as_documented("wbdump", "blocks", &wb!("wbdump", "blocks", "--json", &pair.cache));
    is_as_documented(
        "wbdump",
        "block",
        &wb!("wbdump", "block", "--json", "--data", &pair.cache, block),
    );
    is_documented("wbcheck", "", &wb!("wbcheck", "--json", "--segment", "7", &pair.cache));
    let devices = [Path::new("--cache"), &pair.cache, Path::new("--backing"), &pair.backing];
    for command in ["replay", "upgrade"] {
        let outcome =
            run("wbctl", [command, "--json", "--dry-run"].map(Path::new).iter().chain(&devices));
        is_as_documented("wbctl", command, &outcome);
    }
    let table = dir.path().join("table");
    std::fs::write(&table, "data /dev/a /dev/b\n").unwrap();
    is_as_documented("wbctl", "import", &wb!("wbctl", "import", "--json", "--dry-run", &table));
    // A log that is corrupt has more to tell, and so has its repair.
    flip_bit(&pair.cache, segment_offset(&pair.cache, 3) + 4096);
    let corrupt = wb!("wbcheck", "--json", &pair.cache);
    assert!(
        corrupt.code == 4 && !corrupt.json()["salvage"].as_array().unwrap().is_empty(),
        "{corrupt:?}"
    );
    is_documented("wbcheck", "", &corrupt);
    is_documented("wbcheck", "", &wb!("wbcheck", "--json", "--repair", "--salvage", &pair.cache));
}

#[test]
fn the_manual_tells_of_each_member_of_the_json_of_a_volume() {
    needs_serving!();
    let volume = Volume::created(8, 4 << 20);
    let attached = volume.attach();
    let status = volume.wbctl(&["status", "--json", &volume.name]);
    assert!(status.json()["live"].is_object(), "{status:?}");
    is_as_documented("wbctl", "status", &status);
    is_documented("wbctl", "get", &volume.wbctl(&["get", "--json", &volume.name]));
    // Two flushes, so that a commit has one before it.
    let device = File::options().write(true).open(&attached.device).unwrap();
    for at in [0, 4096] {
        device.write_all_at(&[7; 4096], at).unwrap();
        device.sync_all().unwrap();
    }
    let segment = wb!("wbdump", "segment", "--json", &volume.cache, "1");
    is_as_documented("wbdump", "segment", &segment);
    let json = segment.json();
    assert_eq!((&json["state"], &json["closed"]), (&"live".into(), &"open".into()), "{json}");
    assert_eq!(json["extension"]["commit_before"]["length_blocks"], 1, "{json}");
    assert!(json["metablocks"][1]["crc"].is_u64(), "{json}");
    let map = wb!("wbdump", "map", &volume.cache).stdout;
    assert!(map.contains("open           1 segment"), "{map}");
    drop((device, attached));
}
