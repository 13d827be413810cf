//! `wb-bench`: what wb costs. Each figure is measured beside the thing that it is compared with, in the same run and
//! in turn with it, and the ratio is the median over rounds: the machine may be slower tomorrow, the ratio is not.

mod append;
mod cpu;
mod fio;
mod loops;
mod memory;
mod report;
mod rig;

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
    #[arg(long, global = true, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// How often to measure each figure
    #[arg(long, global = true, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Where to put the cache and backing files; a filesystem with direct I/O says most
    #[arg(long, global = true, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
}

#[derive(Subcommand, Clone, Copy, PartialEq, Eq)]
enum What {
    /// A loop device over a cache, against one over plain memory (needs root)
    Loop,
    /// Processor time per write into the engine, against copying and checksumming
    Cpu,
    /// Random writes into the engine on a file, against sequential writes to that file
    Append,
    /// Everything
    All,
}

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
            "only root can make loop devices and mounts; 'cpu' and 'append' need no root"
        );
    }
    rig::watch_signals()?;
    let mut tables: Vec<Table> = Vec::new();
    let mut finished = |table: Table| {
        if !cli.options.json {
            println!("{table}");
        }
        tables.push(table);
    };
    if all || cli.what == What::Cpu {
        finished(cpu::measure(&cli.options)?);
    }
    if all || cli.what == What::Append {
        finished(append::measure(&cli.options)?);
    }
    if all || cli.what == What::Loop {
        finished(loops::measure(&cli.options)?);
    }
    if cli.options.json {
        println!("{}", serde_json::to_string_pretty(&tables)?);
    }
    Ok(())
}
