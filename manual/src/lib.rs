//! The manual and the shell completions, made from the command lines that the programs parse, and
//! from what is written about them in this folder.

mod page;

use anyhow::{Context, Result};
use clap::Command;
use clap_complete::Shell;
use std::fs;
use std::path::{Path, PathBuf};

/// A program: its command line, and the sections that are written about it.
pub struct Program {
    /// As it is parsed.
    pub command: Command,
    /// In roff.
    pub sections: &'static str,
}

/// All programs.
pub fn programs() -> [Program; 4] {
    [
        Program { command: wbctl::command(), sections: include_str!("wbctl.roff") },
        Program { command: wbformat::command(), sections: include_str!("wbformat.roff") },
        Program { command: wbcheck::command(), sections: include_str!("wbcheck.roff") },
        Program { command: wbdump::command(), sections: include_str!("wbdump.roff") },
    ]
    .map(|program| {
        // Gives each verb its whole name, such as "wbctl attach".
        let mut command = program.command.disable_help_subcommand(true);
        command.build();
        Program { command, ..program }
    })
}

/// A verb with its verbs below it, and so on.
pub fn with_verbs(command: &Command) -> Vec<&Command> {
    let below = command.get_subcommands().filter(|verb| !verb.is_hide_set()).flat_map(with_verbs);
    std::iter::once(command).chain(below).collect()
}

/// Where a shell looks for the completion of a program, below the folder of shared files.
pub fn completion(shell: Shell, program: &str) -> PathBuf {
    match shell {
        Shell::Zsh => format!("zsh/vendor-completions/_{program}"),
        Shell::Fish => format!("fish/vendor_completions.d/{program}.fish"),
        _ => format!("bash-completion/completions/{program}"),
    }
    .into()
}

/// The shells that there are completions for.
pub const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

/// Writes everything below `folder`, as it is to lie below `/usr/share`.
///
/// # Errors
/// When a file cannot be written.
pub fn write(folder: &Path) -> Result<()> {
    for mut program in programs() {
        let name = program.command.get_name().to_string();
        put(&folder.join(format!("man/man8/{name}.8")), &page::page(&program)?)?;
        for shell in SHELLS {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut program.command, &name, &mut text);
            if shell == Shell::Bash {
                text = behind_equals(String::from_utf8(text)?)?.into();
            }
            put(&folder.join(completion(shell, &name)), &text)?;
        }
    }
    put(&folder.join("man/man7/wb.7"), include_bytes!("wb.7"))
}

/// A completion for bash that also knows the option before an `=`, which is a word of its own to
/// bash.
fn behind_equals(text: String) -> Result<String> {
    const PREVIOUS: &str = "    prev=\"$3\"\n";
    const BEHIND: &str = "    [[ \"$prev\" == \"=\" ]] && prev=\"${COMP_WORDS[COMP_CWORD-2]}\"\n";
    anyhow::ensure!(text.contains(PREVIOUS), "clap_complete no longer writes: {PREVIOUS}");
    Ok(text.replacen(PREVIOUS, &format!("{PREVIOUS}{BEHIND}"), 1))
}

fn put(path: &Path, text: &[u8]) -> Result<()> {
    let folder = path.parent().context("a path without a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
