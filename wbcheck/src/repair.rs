//! `wbcheck --repair`: repairs what can be repaired. With --salvage, gives up what must be given
//! up.

use crate::args::Args;
use crate::findings::{Findings, Verdict};
use crate::subject::Subject;
use crate::text;
use anyhow::Result;
use libwb::log::salvage::Plan;

/// What a repair did to a device, and what was wrong before it.
pub(crate) struct Repaired {
    /// The first line of the report before the repair.
    pub(crate) headline: String,
    pub(crate) verdict: Verdict,
    /// What was written, one thing each.
    pub(crate) written: Vec<String>,
    pub(crate) plan: Option<Plan>,
}

/// Repairs a device, and checks it again. Returns `None` if there was nothing to do, or only what
/// needs --salvage.
pub(crate) fn repair(
    subject: &mut Subject,
    before: &Findings,
    args: &Args,
) -> Result<Option<(Repaired, Findings)>> {
    let plan = plan(subject, before, args)?;
    if plan.is_none() && subject.damaged_magic.is_none() {
        return Ok(None);
    }
    let repaired = Repaired::of(subject, before, plan);
    if let Some(plan) = &repaired.plan {
        subject.io.block_on(plan.apply(&subject.device))?;
        subject.read_superblock()?;
    }
    let after = Findings::gather(subject, args)?;
    Ok(Some((repaired, after)))
}

impl Repaired {
    fn of(subject: &Subject, before: &Findings, plan: Option<Plan>) -> Repaired {
        let changes = plan.as_ref().map(Plan::changes).unwrap_or_default();
        match subject.damaged_magic {
            None => Repaired {
                headline: text::headline(before),
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

/// The plan; `None` if there is nothing to do, or only what needs --salvage.
fn plan(subject: &Subject, findings: &Findings, args: &Args) -> Result<Option<Plan>> {
    let Subject { io, device, backing, .. } = subject;
    let Findings { scanned, .. } = findings;
    let mut plan = match args.salvage.salvage {
        _ if !scanned.is_corrupt() || scanned.lost_nothing_but_the_pairing() => {
            io.block_on(scanned.repair(device))?
        }
        Some(way) => io.block_on(scanned.salvage(device, way))?,
        None => None,
    };
    if let (Some(plan), Some(backing)) =
        (&mut plan, backing.as_ref().filter(|it| it.identity.is_some()))
    {
        plan.pair(&backing.facts());
        if plan.mode.is_some() {
            io.block_on(plan.check_backing(device, &backing.facts()))?;
        }
    }
    Ok(plan)
}
