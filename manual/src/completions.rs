//! Shell completions.

use anyhow::Result;
use clap::Command;
use clap_complete::Shell;
use std::path::PathBuf;

/// Where a shell looks for the completion of a program, below the folder of shared files.
pub fn completion(shell: Shell, program: &str) -> PathBuf {
    match shell {
        Shell::Zsh => format!("zsh/vendor-completions/_{program}"),
        Shell::Fish => format!("fish/vendor_completions.d/{program}.fish"),
        _ => format!("bash-completion/completions/{program}"),
    }
    .into()
}

/// The shells with completions.
pub const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

/// The completion of a program for a shell.
pub(super) fn completions(shell: Shell, command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_name().to_string();
    let mut text = Vec::new();
    clap_complete::generate(shell, command, &name, &mut text);
    if shell == Shell::Bash {
        text = behind_equals(String::from_utf8(text)?)?.into();
    }
    Ok(text)
}

/// Makes a completion for bash recognize the option before an `=`, which is a separate word to
/// bash.
fn behind_equals(text: String) -> Result<String> {
    const PREVIOUS: &str = "    prev=\"$3\"\n";
    const BEHIND: &str = "    [[ \"$prev\" == \"=\" ]] && prev=\"${COMP_WORDS[COMP_CWORD-2]}\"\n";
    anyhow::ensure!(text.contains(PREVIOUS), "clap_complete no longer writes: {PREVIOUS}");
    Ok(text.replacen(PREVIOUS, &format!("{PREVIOUS}{BEHIND}"), 1))
}
