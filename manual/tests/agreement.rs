//! Help, man pages and completions come from the same command lines, render without warnings, and
//! what is written beside them speaks of commands and options that there are.

use clap_complete::Shell;
use manual::{Program, SHELLS, completion, programs, with_verbs};
use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use tempfile::TempDir;

fn written() -> TempDir {
    let folder = TempDir::new().expect("a folder to write to");
    manual::write(folder.path()).expect("a folder to write to");
    folder
}

fn pages(folder: &TempDir) -> Vec<PathBuf> {
    let mut pages = vec![PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../man/wb.5"))];
    for section in ["man7", "man8"] {
        let found =
            fs::read_dir(folder.path().join("man").join(section)).expect("a folder to write to");
        pages.extend(found.map(|entry| entry.expect("a folder to write to").path()));
    }
    pages
}

fn options(program: &Program) -> BTreeSet<String> {
    with_verbs(&program.command)
        .iter()
        .flat_map(|verb| verb.get_arguments())
        .filter(|argument| !argument.is_hide_set())
        .filter_map(|argument| argument.get_long().map(String::from))
        .collect()
}

#[test]
fn every_page_renders_without_warnings() {
    let folder = written();
    let pages = pages(&folder);
    assert_eq!(pages.len(), 6, "{pages:?}");
    for page in pages {
        let groff = Command::new("groff")
            .args(["-man", "-Tutf8", "-Kutf8", "-ww", "-z"])
            .arg(&page)
            .output();
        let output = groff.expect("groff, of the package groff-base");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{}: {said}", page.display());
    }
}

#[test]
fn each_command_and_option_is_in_help_page_and_completions() {
    let folder = written();
    for program in programs() {
        let name = program.command.get_name();
        let page = fs::read_to_string(folder.path().join(format!("man/man8/{name}.8"))).unwrap();
        let page =
            page.replace("\\-", "-").replace("\\fR", "").replace("\\fB", "").replace("\\fI", "");
        let completions = SHELLS.map(|shell| {
            (shell, fs::read_to_string(folder.path().join(completion(shell, name))).unwrap())
        });
        for verb in with_verbs(&program.command) {
            let help = verb.clone().render_long_help().to_string();
            for argument in verb.get_arguments().filter(|argument| !argument.is_hide_set()) {
                let Some(long) = argument.get_long() else { continue };
                assert!(help.contains(&format!("--{long}")), "{}: --{long}", verb.get_name());
                assert!(page.contains(&format!("--{long}")), "{name}(8): --{long}");
                for (shell, text) in &completions {
                    let dashes = if *shell == Shell::Fish { "-l " } else { "--" };
                    assert!(text.contains(&format!("{dashes}{long}")), "{name}, {shell}: --{long}");
                }
            }
        }
        for verb in &with_verbs(&program.command)[1..] {
            assert!(
                page.contains(&format!(".SS {}\n", verb.get_name())),
                "{name}(8): {}",
                verb.get_name()
            );
            for (shell, text) in &completions {
                assert!(text.contains(verb.get_name()), "{name}, {shell}: {}", verb.get_name());
            }
        }
    }
}

/// Words of a text that look like `--option`.
fn long_options(text: &str) -> BTreeSet<String> {
    text.replace("\\-", "-")
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_'))
        .filter_map(|word| word.strip_prefix("--"))
        .filter(|word| !word.is_empty())
        .map(String::from)
        .collect()
}

/// A text without the commands of other programs: their lines, and those that continue them. What
/// others run through wbctl stays.
fn without_other_programs(text: &str) -> String {
    let other = [
        "docker",
        "drbdadm",
        "iscsiadm",
        "mdadm",
        "nbdkit",
        "qemu\\-nbd",
        "systemctl",
        "systemd\\-escape",
    ];
    let text = text.replace("\\-\\-stop\\-timeout 120 \\-\\-security\\-opt", "");
    let mut of_other = false;
    let is_ours = |line: &&str| {
        let command = line.trim_start_matches(".B ");
        of_other = of_other || other.iter().any(|name| command.starts_with(name));
        let is_ours = !of_other || command.contains("wbctl ");
        of_other = of_other && line.ends_with("\\e");
        is_ours
    };
    text.lines().filter(is_ours).map(|line| format!("{line}\n")).collect()
}

#[test]
fn what_is_written_names_commands_and_options_that_there_are() {
    let programs = programs();
    let known: BTreeSet<String> = programs.iter().flat_map(options).collect();
    let recipes = without_other_programs(include_str!("../src/wb.7"));
    let texts = programs.iter().map(|program| program.sections).chain([recipes.as_str()]);
    for text in texts {
        let strange: Vec<_> = long_options(text).difference(&known).cloned().collect();
        assert!(strange.is_empty(), "no program has {strange:?}");
        for line in text.lines().map(|line| line.trim_start_matches(".B ")) {
            // What is to be typed: "wbctl VERB ...".
            let mut words = line.split_whitespace();
            let name = words.next().unwrap_or_default();
            let Some(program) = programs.iter().find(|program| program.command.get_name() == name)
            else {
                continue;
            };
            let Some(verb) = words.next() else { continue };
            let is_known = !program.command.has_subcommands()
                || program.command.find_subcommand(verb).is_some();
            assert!(is_known, "no such command: {line}");
        }
    }
}

#[test]
fn bash_takes_the_completions() {
    let folder = written();
    for program in programs() {
        let path = folder.path().join(completion(Shell::Bash, program.command.get_name()));
        let status =
            Command::new("bash").arg("-n").arg(&path).stdin(Stdio::null()).status().expect("bash");
        assert!(status.success(), "{}", path.display());
    }
}

/// What bash offers where the last of these words ends.
fn offered(folder: &TempDir, words: &[&str]) -> String {
    let [name, .., previous, current] = words else { panic!("too few words: {words:?}") };
    let script = r#"source "$1"; shift; previous=$1 current=$2; shift 2
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); "_$1" "$1" "$current" "$previous"
        echo "${COMPREPLY[@]}""#;
    let mut bash = Command::new("bash");
    bash.args(["-c", script, "bash"]).arg(folder.path().join(completion(Shell::Bash, name)));
    // A word that only begins is empty to the function.
    bash.args([previous, current.trim_start_matches('=')]).args(words).current_dir(folder.path());
    let output = bash.output().expect("bash");
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).expect("words").trim_end().into()
}

#[test]
fn an_option_of_few_values_is_completed_with_them_and_a_device_with_paths() {
    let folder = written();
    for words in [
        &["wbctl", "attach", "--salvage", "="][..],
        &["wbctl", "replay", "--salvage", "=", "s"],
        &["wbcheck", "--repair", "--salvage", "=", "s"],
    ] {
        assert_eq!(offered(&folder, words), "skip stop", "{words:?}");
    }
    for verb in ["create", "attach"] {
        assert_eq!(offered(&folder, &["wbctl", verb, "--sector-size", ""]), "512 4096");
        assert_eq!(offered(&folder, &["wbctl", verb, "--sector-size", "=", "4"]), "4096");
        assert_eq!(offered(&folder, &["wbctl", verb, "--cache", "ma"]), "man");
    }
    for program in programs() {
        let name = program.command.get_name();
        for shell in SHELLS {
            let text = fs::read_to_string(folder.path().join(completion(shell, name))).unwrap();
            for argument in
                with_verbs(&program.command).iter().flat_map(|verb| verb.get_arguments())
            {
                for value in argument
                    .get_possible_values()
                    .iter()
                    .filter(|_| argument.get_action().takes_values())
                {
                    assert!(
                        text.contains(value.get_name()),
                        "{name}, {shell}: {argument}, {value:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_synopsis_is_the_usage_that_help_shows() {
    let folder = written();
    for program in programs() {
        let name = program.command.get_name();
        let page = folder.path().join(format!("man/man8/{name}.8"));
        let groff = Command::new("groff")
            .args(["-man", "-Tascii", "-P-cbou", "-rLL=200n"])
            .arg(&page)
            .output();
        let text =
            String::from_utf8(groff.expect("groff, of the package groff-base").stdout).unwrap();
        for verb in with_verbs(&program.command) {
            let usage = verb.clone().render_usage().to_string();
            let usage = usage.trim_start_matches("Usage: ");
            assert!(
                text.lines().any(|line| line.trim() == usage),
                "{name}(8) lacks: {usage}\n{text}"
            );
        }
    }
}

#[test]
fn every_tunable_is_in_the_manual() {
    let page = include_str!("../src/wbctl.roff");
    for key in libwb::cache::Tunables::keys() {
        assert!(page.contains(&format!(".BR {key} =")), "{key} is not in wbctl.roff");
    }
}

#[test]
fn what_a_power_cut_leaves_is_said_in_the_same_words_everywhere() {
    let promise = "the volume is the state after some prefix of the acknowledged writes, at or \
                   after the last acknowledged flush. The unit is the 4 KiB block: an unflushed \
                   request of several blocks may be cut between two.";
    for (name, text) in [
        ("README.md", include_str!("../../README.md")),
        ("ARCHITECTURE.md", include_str!("../../ARCHITECTURE.md")),
        ("wbctl(8)", include_str!("../src/wbctl.roff")),
    ] {
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(text.matches("prefix of the acknowledged writes").count(), 1, "{name}");
        assert!(text.contains(promise), "{name}");
    }
}
