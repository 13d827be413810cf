//! `wbctl`: creates, attaches, detaches, replays and upgrades caches.

mod apart;
mod attach;
mod client;
mod config;
mod create;
mod daemon;
mod devices;
mod dm;
mod ending;
mod holders;
mod import;
mod interval;
mod keeper;
mod leftovers;
mod logging;
mod notes;
mod notify;
mod older;
mod pair;
mod prometheus;
mod remove;
mod replay;
mod rival;
mod salvage;
mod sector_size;
mod show;
mod signals;
mod stat;
mod top;
mod tune;
mod upgrade;
mod volume_paths;
mod watch;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};
use libwb::cli::{self, Exit, Output};
use nix::sys::stat::{Mode, umask};
use std::process::ExitCode;
use volume_paths::VolumeName;

/// Put a fast device in front of a slow one as a write cache.
///
/// Writes go to the fast device as one log, and are written back in the background, sorted and
/// merged.
#[derive(Parser)]
#[command(name = "wbctl", version, after_help = cli::EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a cache device and record the volume under a name
    Create(create::Args),
    /// Recover a volume and serve it as a loop device, in the foreground
    ///
    /// Prints `ready /dev/loopN` when the volume can be used. On SIGTERM and SIGINT it serves on
    /// while the device is held, for up to a minute or until a second signal; then it closes the
    /// log and ends. Dirty data stays in the cache. After a second signal it ends within seconds,
    /// even if a device hangs; a third ends it at once. Other signals, such as SIGHUP and SIGTSTP
    /// of a terminal, are ignored.
    Attach(attach::Args),
    /// Stop serving a volume, and wait until that is done
    Detach(client::DetachArgs),
    /// Show all volumes that are recorded or attached
    List {
        /// Print one JSON object per volume and line instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Show the state of volumes, or of all that are attached or need attention
    ///
    /// With NAME, the exit code tells of the volume: 0 it is attached and healthy, 3 it is not
    /// attached, 4 it has failed (writes are refused) or its daemon does not answer, 5 it is
    /// degraded: it works, but something is wrong, such as write-back that fails. Of several
    /// volumes, it tells the worst. 1 is for all else.
    Status(show::StatusArgs),
    /// Show what an attached volume does: requests, throughput, hits and latencies, a line for each
    /// interval
    ///
    /// r, w, f: reads, writes, flushes; wb: write-back; rhit%: of the blocks read, those that the
    /// cache held; log%: how much of the log is in use, for what is not written back. 50us and
    /// 99us: in how many microseconds so many percent were answered. A terminal of less than 126
    /// columns shows the most important of them.
    Stat(stat::Args),
    /// Watch an attached volume: latencies, rates, how full the log is. The key q quits
    ///
    /// position is the cache device from its beginning to its end: █ what is not written back, ▶
    /// the newest segment, and · what may be written over.
    Top(top::Args),
    /// Make everything that was written to an attached volume survive a power cut
    Flush {
        /// The volume
        name: VolumeName,
    },
    /// Write all dirty data of an attached volume back to its backing device
    ///
    /// Shows progress on a terminal. Can be interrupted (Ctrl-C) and repeated: what was written
    /// back stays so, and the volume goes on as before.
    Drain {
        /// The volume
        name: VolumeName,
    },
    /// Write nothing back from an attached volume, until `wbctl resume`, or until the volume is
    /// attached anew
    ///
    /// All writes stay in the cache meanwhile: for a quiet disk while something else needs it. A
    /// drain that is asked for, and a log that is full, write back all the same. Waits for up to 10
    /// seconds for the batch that is being written back, and says so if that takes longer.
    Pause {
        /// The volume
        name: VolumeName,
    },
    /// End a pause
    Resume {
        /// The volume
        name: VolumeName,
    },
    /// Let all counters of an attached volume start anew
    ClearStats {
        /// The volume
        name: VolumeName,
    },
    /// Show the tunables of a volume: those in force, or those that it is to be attached with
    Get(tune::GetArgs),
    /// Change tunables of an attached volume, from now on
    Set(tune::SetArgs),
    /// Forget a volume that is detached and has no dirty data. Its devices are left as they are
    Remove(remove::Args),
    /// Take over the volumes of the script `writeboost`: record what its table lists. Touches no
    /// device
    Import(import::Args),
    /// Write all dirty data back to the backing device offline, and mark the cache clean
    ///
    /// Serves nothing, and needs no root for plain files. Safe to interrupt and to repeat.
    Replay(replay::Args),
    /// Give a cache device of the kernel module what wb keeps beyond its format, in place
    ///
    /// That is an identity, a pairing with the backing device, so that a wrong one is refused, and
    /// from then on a CRC of every block that is written. What is in the cache stays as it is, and
    /// the kernel module can still read it.
    Upgrade(upgrade::Args),
    /// What a daemon has another process do
    #[command(hide = true)]
    Apart(apart::Args),
}

/// The command line, as it is parsed and documented.
pub fn command() -> clap::Command {
    Cli::command()
}

/// The program.
pub fn main() -> ExitCode {
    // Whatever it was: records, notes, links' folders and sockets are not for others to write to.
    let before = umask(Mode::empty());
    umask(before | Mode::S_IWGRP | Mode::S_IWOTH);
    let cli = Cli::parse();
    cli::run("wbctl", Exit::Failed, |out| run(cli.command, out))
}

fn run(command: Command, out: &mut Output) -> Result<Exit> {
    match command {
        Command::Create(args) => return create::create(&args, out),
        Command::Attach(args) => return attach::attach(&args, out),
        Command::Detach(args) => client::detach(&args, out)?,
        Command::List { json } => show::list(json, out)?,
        Command::Status(args) => return show::status(&args, out),
        Command::Stat(args) => stat::stat(&args, out)?,
        Command::Flush { name } => client::flush(&name, out)?,
        Command::Drain { name } => client::drain(&name, out)?,
        Command::Pause { name } => client::pause(&name, out)?,
        Command::Resume { name } => client::resume(&name, out)?,
        Command::Top(args) => top::top(&args)?,
        Command::ClearStats { name } => client::clear_stats(&name, out)?,
        Command::Get(args) => tune::get(&args, out)?,
        Command::Set(args) => tune::set(&args, out)?,
        Command::Remove(args) => remove::remove(&args, out)?,
        Command::Import(args) => import::import(&args, out)?,
        Command::Replay(args) => replay::replay(&args, out)?,
        Command::Upgrade(args) => upgrade::upgrade(&args, out)?,
        Command::Apart(args) => apart::carry_out(&args),
    }
    Ok(Exit::Done)
}
