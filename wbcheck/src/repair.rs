//! `wbcheck --repair`: put right what can be, and with --salvage, give up what must be.

use crate::findings::{Findings, Verdict};
use crate::{Args, Subject, report, words};
use anyhow::Result;
use libwb::cli::{Exit, Output};
use libwb::log::salvage::{Plan, ways_on};
use libwb::log::scan::BackingFacts;
use std::io::Write;

/// What was done to a device, and what had been wrong with it.
pub(crate) struct Repaired {
    /// The first line of the report before it.
    pub(crate) headline: String,
    pub(crate) verdict: Verdict,
    pub(crate) plan: Plan,
}

pub(crate) fn repair(
    subject: &mut Subject,
    findings: Findings,
    args: &Args,
    out: &mut Output,
) -> Result<Exit> {
    let Some(plan) = plan(subject, &findings, args)? else {
        return crate::print(&findings, args, out);
    };
    subject.io.block_on(plan.apply(&subject.device))?;
    subject.read_superblock()?;
    let repaired = Repaired { headline: words::headline(&findings), verdict: findings.verdict(), plan };
    let after = Findings::gather(subject, args)?;
    if args.json {
        out.json(&report::Report::of(&after, Some(&repaired)))?;
    } else if !args.quiet {
        print(&repaired, &after, out)?;
    } else if after.verdict().exit() != Exit::Done {
        writeln!(out, "{}", words::headline(&after))?;
    }
    Ok(if after.verdict().exit() == Exit::Done { Exit::Repaired } else { Exit::ErrorsLeft })
}

/// What to do; `None` when there is nothing, or it must be asked for.
fn plan(subject: &Subject, findings: &Findings, args: &Args) -> Result<Option<Plan>> {
    let Subject { io, device, backing, .. } = subject;
    if !findings.scanned.is_corrupt() {
        return Ok(findings.scanned.repair(device)?);
    }
    let Some(way) = args.salvage else { return Ok(None) };
    let plan = io.block_on(findings.scanned.salvage(device, way))?;
    if let (Some(plan), Some(backing)) = (&plan, backing) {
        let name = backing.path.display().to_string();
        // Whether it is the right one was looked at before.
        let facts = BackingFacts { name: &name, sectors: backing.sectors, identity: "" };
        io.block_on(plan.check_backing(device, &facts))?;
    }
    Ok(plan)
}

fn print(repaired: &Repaired, after: &Findings, out: &mut Output) -> Result<()> {
    match after.verdict().exit() {
        Exit::Done => writeln!(out, "{}: repaired, and sound now", after.device)?,
        _ => writeln!(out, "{}", words::headline(after))?,
    }
    writeln!(out, "  before          {}", repaired.headline)?;
    writeln!(out, "\nWritten:")?;
    for change in repaired.plan.changes() {
        writeln!(out, "  - {change}")?;
    }
    for line in ways_on(std::slice::from_ref(&repaired.plan), "--salvage") {
        writeln!(out, "\nSalvaged: {line}")?;
    }
    let blocks = repaired.plan.blocks_in_words();
    if !blocks.is_empty() {
        writeln!(out, "Given up, in units of 4096 bytes of the backing device: {blocks}")?;
    }
    Ok(())
}
