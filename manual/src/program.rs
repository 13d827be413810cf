//! The programs that the manual is about.

use clap::Command;

/// A program: its command line, and the sections of its page that are written by hand.
pub struct Program {
    /// The command line as the program parses it.
    pub command: Command,
    /// The sections, in roff.
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
        // Gives each verb its full name, such as "wbctl attach".
        let mut command = program.command.disable_help_subcommand(true);
        command.build();
        Program { command, ..program }
    })
}

/// A command and all commands below it.
pub fn with_verbs(command: &Command) -> Vec<&Command> {
    let below = command.get_subcommands().filter(|verb| !verb.is_hide_set()).flat_map(with_verbs);
    std::iter::once(command).chain(below).collect()
}
