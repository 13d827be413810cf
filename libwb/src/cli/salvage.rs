//! The option `--salvage`.

use crate::log::salvage::SalvageMode;
use clap::builder::{PossibleValuesParser, TypedValueParser};

/// How to go on with a corrupt log, as an option of a program.
#[derive(clap::Args)]
pub struct SalvageOption {
    /// Go on with a corrupt log, and give up what must be given up: with skip the damaged blocks
    /// alone, with stop everything after them
    ///
    /// Without it, a corrupt log stays as it is, and the program shows what each way would give up.
    /// Copy the cache device first: what is given up is gone forever. A sound log loses nothing.
    #[arg(
        long,
        value_name = "skip|stop",
        value_parser =
            PossibleValuesParser::new(["skip", "stop"]).try_map(|way| way.parse::<SalvageMode>()),
        hide_possible_values = true,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "skip"
    )]
    pub salvage: Option<SalvageMode>,
}
