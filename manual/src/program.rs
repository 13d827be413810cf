//! The programs that the manual is about.

use clap::Command;

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
