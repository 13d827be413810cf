//! How attach and replay deal with a corrupt log.

use anyhow::{Result, anyhow};
use libwb::cache::CacheError;
use libwb::cli::SalvageOption;
use libwb::device::Device;
use libwb::log::pairing::BackingFacts;
use libwb::log::reach::Reach;
use libwb::log::salvage::{Plan, SalvageMode, Scanned, salvage_advice, salvage_options};
use libwb::log::{LogError, Use};

/// Opens a cache whose log is known to have reached `known`. If the log is corrupt, salvages it
/// first if the user asked for that; otherwise reports what can be done.
pub(crate) async fn open<T>(
    option: &SalvageOption,
    cache: &Device,
    backing: &Device,
    known: Option<Reach>,
    open: impl AsyncFn(Option<Reach>) -> Result<T, CacheError>,
) -> Result<(T, Option<Plan>)> {
    if let Some(way) = option.salvage {
        // `open` may read only headers, and the damage may be in the data.
        let scanned = Scanned::read(cache, Use::Write, |_| ()).await?;
        let mut plan = scanned.salvage(cache, way).await?;
        if let Some(plan) = &mut plan {
            known
                .map_or(Ok(()), |known| plan.refuse_older(cache, known))
                .map_err(CacheError::Log)?;
            plan.pair(&BackingFacts::of(backing));
            plan.check_backing(cache, &BackingFacts::of(backing)).await?;
            plan.apply(cache).await?;
        }
        // A salvage shortens the log, but does not undo write-back.
        let known = known.map(|known| if plan.is_some() { known.shortened() } else { known });
        return Ok((open(known).await?, plan));
    }
    match open(known).await {
        Err(CacheError::Log(error)) if error.is_corruption() => {
            let scanned = Scanned::read(cache, Use::Read, |_| ()).await?;
            Err(what_can_be_done(&error, cache, &scanned).await?)
        }
        opened => Ok((opened?, None)),
    }
}

/// What a salvage did, one sentence each.
pub(crate) fn outcome(plan: &Plan) -> Vec<String> {
    let mut lines = salvage_options(std::slice::from_ref(plan), "--salvage");
    if !plan.blocks_text().is_empty() {
        lines.push(format!(
            "given up, in units of 4096 bytes of the backing device: {}",
            plan.blocks_text()
        ));
    }
    lines
}

async fn what_can_be_done(
    refused: &LogError,
    cache: &Device,
    scanned: &Scanned,
) -> Result<anyhow::Error, LogError> {
    let plans = scanned.salvage_plans(cache).await?;
    if plans.is_empty() {
        // This call reports why there is none.
        scanned.salvage(cache, SalvageMode::Skip).await?;
    }
    let ways: String =
        salvage_options(&plans, "--salvage").iter().map(|way| format!("\n  {way}")).collect();
    Ok(anyhow!(
        "{refused}\n  Neither device was changed. Copy the cache device before anything else; \
         then {}:{ways}",
        salvage_advice(&plans)
    ))
}
