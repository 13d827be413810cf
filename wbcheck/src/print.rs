//! Prints what a check found, or a repair did, as the options say, and tells how the program ends.

use crate::args::Args;
use crate::findings::Findings;
use crate::json::CheckReport;
use crate::repair::Repaired;
use crate::text;
use anyhow::Result;
use libwb::cli::{Exit, Output};
use libwb::log::salvage::salvage_options;
use std::io::Write;

/// Prints the findings of a check.
pub(crate) fn checked(findings: &Findings, args: &Args, out: &mut Output) -> Result<Exit> {
    let exit = findings.verdict().exit();
    if args.json {
        out.json(&CheckReport::of(findings, None))?;
    } else if !args.quiet {
        text::print(findings, out)?;
    } else if exit != Exit::Done {
        writeln!(out, "{}", text::headline(findings))?;
    }
    Ok(exit)
}

/// Prints what a repair did, and what a check found after it.
pub(crate) fn repaired(
    repaired: &Repaired,
    after: &Findings,
    args: &Args,
    out: &mut Output,
) -> Result<Exit> {
    let is_sound = after.verdict().exit() == Exit::Done;
    if args.json {
        out.json(&CheckReport::of(after, Some(repaired)))?;
    } else if !args.quiet {
        repair_in_words(repaired, after, out)?;
    } else if !is_sound {
        writeln!(out, "{}", text::headline(after))?;
    }
    Ok(if is_sound { Exit::Repaired } else { Exit::ErrorsLeft })
}

fn repair_in_words(repaired: &Repaired, after: &Findings, out: &mut Output) -> Result<()> {
    match after.verdict().exit() {
        Exit::Done => writeln!(out, "{}: repaired, and sound now", after.device)?,
        _ => writeln!(out, "{}", text::headline(after))?,
    }
    writeln!(out, "  before          {}", repaired.headline)?;
    writeln!(out, "\nWritten:")?;
    for change in &repaired.written {
        writeln!(out, "  - {change}")?;
    }
    let Some(plan) = &repaired.plan else { return Ok(()) };
    for line in salvage_options(std::slice::from_ref(plan), "--salvage") {
        writeln!(out, "\nSalvaged: {line}")?;
    }
    let blocks = plan.blocks_text();
    if !blocks.is_empty() {
        writeln!(out, "Given up, in units of 4096 bytes of the backing device: {blocks}")?;
    }
    Ok(())
}
