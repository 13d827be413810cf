//! `wb-bench` measures what wb costs. It measures each figure in turn with its baseline in the same
//! run, and reports the median of the ratios over rounds. A slower machine does not change the
//! ratio. Some figures, such as bytes of memory, have a fixed baseline, which they name.

mod append;
mod attach;
mod check;
mod cpu;
mod fio;
mod flush;
mod full;
mod full_log;
mod loops;
mod metered_device;
mod mixed;
mod model_disk;
mod report;
mod setup;
mod uncached;
mod virtual_time;
mod writeback;

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand};
use report::Table;
use std::path::PathBuf;

/// Measure wb against what it stands on
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    options: Options,
}

/// How to measure.
#[derive(Args)]
struct Options {
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    /// How long to measure each figure in each round
    #[arg(long, global = true, default_value_t = 3, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// How often to measure each figure
    #[arg(long, global = true, default_value_t = 3, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Where to put the cache and backing files; a filesystem with direct I/O says most
    #[arg(long, global = true, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
    /// What 'flush' takes for a cache device, instead of a file; all its data is lost
    #[arg(long, global = true, value_name = "PATH")]
    cache: Option<PathBuf>,
}

#[derive(Subcommand, Clone, Copy, PartialEq, Eq)]
enum What {
    /// A loop device over a cache, against one over plain memory (needs root)
    Loop,
    /// Processor time per write into the engine, against copying and checksumming
    Cpu,
    /// Random writes into the engine on a file, against sequential writes to that file
    Append,
    /// Writes that are flushed one by one, against a plain write and fdatasync; what that takes of
    /// the cache device
    Flush,
    /// Such writes beside reads, a discard and a drain, against the same writes alone
    Mixed,
    /// Attaching crashed caches, a full one of 64 GiB and ones of 64 GiB and 1 TiB with little that
    /// is dirty: what is read, and how long it takes
    Recovery,
    /// Resident memory for each cached block at 64 GiB
    Memory,
    /// A modelled hard disk's time for write-back, against the kernel module's policy
    Writeback,
    /// Writes from an empty cache to a full one over a slow backing device: throughput and latency
    Full,
    /// wbcheck of a full cache of 8 GiB, against reading it
    Check,
    /// Everything
    All,
}

type Measure = fn(&Options) -> Result<Vec<Table>>;

const MEASUREMENTS: [(What, Measure); 10] = [
    (What::Cpu, cpu::measure),
    (What::Append, append::measure),
    (What::Flush, flush::measure),
    (What::Mixed, mixed::measure),
    (What::Loop, loops::measure),
    (What::Recovery, attach::recovery),
    (What::Memory, attach::memory),
    (What::Writeback, writeback::measure),
    (What::Full, full::measure),
    (What::Check, check::measure),
];

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("wb-bench: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let all = cli.what == What::All;
    if all || cli.what == What::Loop {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "only root can make loop devices and mounts; all but 'loop' and 'all' need no root"
        );
    }
    setup::watch_signals()?;
    let mut tables: Vec<Table> = Vec::new();
    for (what, measure) in MEASUREMENTS {
        if !all && cli.what != what {
            continue;
        }
        let measured = measure(&cli.options)?;
        if !cli.options.json {
            measured.iter().for_each(|table| println!("{table}"));
        }
        tables.extend(measured);
    }
    if cli.options.json {
        println!("{}", serde_json::to_string_pretty(&tables)?);
    }
    Ok(())
}
