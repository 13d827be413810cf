//! `wbcheck`: reads a cache device and says whether it is sound. It changes nothing without
//! `--repair`.

mod args;
mod findings;
mod json;
mod one_segment;
mod print;
mod repair;
mod subject;
mod text;

use anyhow::Result;
use args::Args;
use clap::{CommandFactory, Parser};
use findings::Findings;
use libwb::cli::{self, Exit, Output};
use libwb::format::SegmentId;
use std::process::ExitCode;
use subject::Subject;

/// The command line, as it is parsed and documented.
pub fn command() -> clap::Command {
    Args::command()
}

/// The program.
pub fn main() -> ExitCode {
    let args = Args::parse();
    cli::run("wbcheck", Exit::CouldNotCheck, |out| check(&args, out))
}

fn check(args: &Args, out: &mut Output) -> Result<Exit> {
    let mut subject = Subject::open(args)?;
    if let Some(id) = args.segment {
        return one_segment::check(&subject, SegmentId(id), args, out);
    }
    let findings = Findings::gather(&subject, args)?;
    if args.repair
        && let Some((repaired, after)) = repair::repair(&mut subject, &findings, args)?
    {
        return print::repaired(&repaired, &after, args, out);
    }
    print::checked(&findings, args, out)
}
