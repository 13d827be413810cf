//! What attach and replay do about a corrupt log.

use anyhow::{Result, anyhow};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use libwb::cache::CacheError;
use libwb::device::Device;
use libwb::log::pairing::BackingFacts;
use libwb::log::reach::Reach;
use libwb::log::salvage::{Plan, SalvageMode, Scanned, salvage_advice, salvage_options};
use libwb::log::{LogError, Use};

#[derive(clap::Args)]
pub(crate) struct Salvage {
    /// Go on with a corrupt log, and give up what has to be: with skip the damaged blocks alone,
    /// with stop all that came after them
    ///
    /// Without it, a corrupt log is refused, and what each way would give up is shown. Copy the
    /// cache device first: what is given up is gone for ever. A log that is not corrupt is not
    /// changed by it.
    #[arg(
        long,
        value_name = "skip|stop",
        value_parser = PossibleValuesParser::new(["skip", "stop"]).try_map(|way| way.parse::<SalvageMode>()),
        hide_possible_values = true,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "skip"
    )]
    salvage: Option<SalvageMode>,
}

impl Salvage {
    /// Opens a cache, whose log is known to have come so far. Where it is corrupt, salvages it
    /// first if that was asked for, or else says what can be done.
    pub(crate) async fn open<T>(
        &self,
        cache: &Device,
        backing: &Device,
        known: Option<Reach>,
        open: impl AsyncFn(Option<Reach>) -> Result<T, CacheError>,
    ) -> Result<(T, Option<Plan>)> {
        if let Some(way) = self.salvage {
            // Open may read headers alone, and what is to be salvaged may be wrong with the data.
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
            // What was given up is gone, but what was written back is not undone.
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
}

/// What a salvage has done, a sentence each.
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
        // It says why there is none.
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
