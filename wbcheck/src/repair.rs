//! `wbcheck --repair`: put right what can be, and with --salvage, give up what must be.

use crate::findings::{Findings, Verdict};
use crate::{Args, Subject, report, words};
use anyhow::Result;
use libwb::cli::{Exit, Output};
use libwb::log::salvage::{Plan, salvage_options};
use libwb::log::segment_writes::write_magic;
use std::io::Write;

/// What was done to a device, and what had been wrong with it.
pub(crate) struct Repaired {
    /// The first line of the report before it.
    headline: String,
    pub(crate) verdict: Verdict,
    /// What was written, one thing each.
    pub(crate) written: Vec<String>,
    pub(crate) plan: Option<Plan>,
}

pub(crate) fn repair(
    subject: &mut Subject,
    findings: Findings,
    args: &Args,
    out: &mut Output,
) -> Result<Exit> {
    let plan = plan(subject, &findings, args)?;
    if plan.is_none() && subject.damaged_magic.is_none() {
        return crate::print(&findings, args, out);
    }
    let repaired = Repaired::of(subject, &findings, plan);
    if let Some(plan) = &repaired.plan {
        subject.io.block_on(plan.apply(&subject.device))?;
        subject.read_superblock()?;
    }
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

impl Repaired {
    fn of(subject: &Subject, before: &Findings, plan: Option<Plan>) -> Repaired {
        let changes = plan.as_ref().map(Plan::changes).unwrap_or_default();
        match subject.damaged_magic {
            None => Repaired {
                headline: words::headline(before),
                verdict: before.verdict(),
                written: changes,
                plan,
            },
            Some(fault) => Repaired {
                headline: fault.to_string(),
                verdict: if before.verdict() == Verdict::Corrupt {
                    Verdict::Corrupt
                } else {
                    Verdict::Damaged
                },
                written: [vec!["the magic, in the first block".into()], changes].concat(),
                plan,
            },
        }
    }
}

/// Writes the magic anew on a device that is a cache without it, so that all else can be checked.
pub(crate) fn restore_magic(subject: &mut Subject) -> Result<()> {
    subject.io.block_on(async {
        write_magic(&subject.device).await?;
        subject.device.flush().await
    })?;
    subject.read_superblock()
}

/// What to do; `None` when there is nothing, or it must be asked for.
fn plan(subject: &Subject, findings: &Findings, args: &Args) -> Result<Option<Plan>> {
    let Subject { io, device, backing, .. } = subject;
    let Findings { scanned, .. } = findings;
    let mut plan = match args.salvage {
        _ if !scanned.is_corrupt() || scanned.lost_nothing_but_the_pairing() => {
            io.block_on(scanned.repair(device))?
        }
        Some(way) => io.block_on(scanned.salvage(device, way))?,
        None => None,
    };
    if let (Some(plan), Some(backing)) =
        (&mut plan, backing.as_ref().filter(|it| it.identity.is_some()))
    {
        let name = backing.path.display().to_string();
        plan.pair(&backing.facts(&name));
        if plan.mode.is_some() {
            io.block_on(plan.check_backing(device, &backing.facts(&name)))?;
        }
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
