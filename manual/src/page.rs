//! One man page for a program with all its verbs.

use crate::program::{Program, with_verbs};
use anyhow::Result;
use clap::Command;
use clap_mangen::Man;
use std::io::Write;

/// The page of a program, in roff.
pub(super) fn page(program: &Program) -> Result<Vec<u8>> {
    let command = &program.command;
    let man = Man::new(command.clone()).section("8").manual("wb").source(version(command)).date("");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    writeln!(page, ".SH SYNOPSIS\n{}", usage(command))?;
    man.render_description_section(&mut page)?;
    let verbs = &with_verbs(command)[1..];
    if verbs.is_empty() {
        man.render_options_section(&mut page)?;
    } else {
        writeln!(page, ".SH COMMANDS")?;
        writeln!(
            page,
            "Every command has \\fB\\-\\-help\\fR. The program itself has \\fB\\-\\-help\\fR and \
             \\fB\\-\\-version\\fR."
        )?;
        for verb in verbs {
            page.extend(section(verb)?);
        }
    }
    if let Some(codes) = command.get_after_help() {
        writeln!(page, ".SH EXIT STATUS\n.nf")?;
        // The first line is a heading.
        for line in codes.to_string().lines().skip(1) {
            writeln!(page, "{}", escaped(line.trim_start()))?;
        }
        writeln!(page, ".fi")?;
    }
    page.extend(program.sections.bytes());
    Ok(page)
}

/// A verb, as a subsection. The headings of its own page become paragraphs.
fn section(verb: &Command) -> Result<Vec<u8>> {
    let verb = verb.clone().mut_arg("help", |help| help.hide(true));
    let man = Man::new(verb.clone());
    let mut parts = Vec::new();
    man.render_description_section(&mut parts)?;
    if verb.get_arguments().any(|argument| !argument.is_hide_set()) {
        man.render_options_section(&mut parts)?;
    }
    let mut section = format!(".SS {}\n{}\n", escaped(verb.get_name()), usage(&verb)).into_bytes();
    for line in String::from_utf8(parts)?.lines() {
        let line = match line {
            heading if heading.starts_with(".SH ") => ".PP",
            // clap_mangen puts these lines before the headings, once for each part.
            r".ie \n(.g .ds Aq \(aq" | r".el .ds Aq '" => continue,
            other => other,
        };
        writeln!(section, "{line}")?;
    }
    Ok(section)
}

/// The usage, as the help shows it. The usage of clap_mangen leaves out the values of options.
fn usage(command: &Command) -> String {
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").trim_start();
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let arguments = usage.strip_prefix(name).unwrap_or(usage).trim_start().replace('\n', " ");
    // Not justified: wider gaps would look like parts of the usage.
    format!(".ad l\n\\fB{}\\fR {}\n.ad", escaped(name), escaped(&arguments))
}

fn version(command: &Command) -> String {
    format!("wb {}", command.get_version().unwrap_or_default())
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}
