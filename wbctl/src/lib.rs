//! `wbctl`: creates, attaches, shows, detaches, replays and upgrades volumes.

mod apart;
mod attach;
mod attach_args;
mod client;
mod config;
mod crashes;
mod create;
mod daemon;
mod devices;
mod dm;
mod ending;
mod front_end;
mod holders;
mod import;
mod interval;
mod keeper;
mod keeping;
mod leftovers;
mod linking;
mod logging;
mod notes;
mod notify;
mod noting;
mod older;
mod opening;
mod over_nbd;
mod pair;
mod programs;
mod prometheus;
mod remove;
mod replay;
mod restart;
mod rival;
mod salvage;
mod sector_size;
mod server;
mod serving;
mod show;
mod signals;
mod standing;
mod stat;
mod to_keeper;
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
/// Writes go to the fast device as one log. The program writes them back to the slow device in the
/// background, sorted and merged.
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
    /// Recover a volume and serve it as a block device or over NBD, in the foreground
    ///
    /// Prints `ready` and the block device, such as `ready /dev/ublkb0`, or the address of the NBD
    /// server, when the volume can be used.
    ///
    /// On SIGTERM or SIGINT, the daemon closes the log and ends; dirty data stays in the cache.
    /// While the device is held, or NBD clients are connected, it keeps serving for up to a minute,
    /// or until a second signal. After a second signal, it ends within seconds, even if a device
    /// hangs. A third signal ends it at once. It ignores other signals, such as SIGHUP and SIGTSTP
    /// of a terminal.
    Attach(attach_args::Args),
    /// Stop serving a volume, and wait until it has stopped
    Detach(client::DetachArgs),
    /// Show all volumes that are recorded or attached
    List {
        /// Print one JSON object per volume and line instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Show the state of volumes, or of all that are attached or need attention
    ///
    /// With NAME, the exit code tells the state of the volume: 0 attached and healthy; 3 not
    /// attached; 4 failed (it refuses writes), or its daemon does not answer; 5 degraded (it works,
    /// but something is wrong, such as failing write-back). With several names, it tells the worst.
    /// 1 stands for any other failure.
    Status(show::StatusArgs),
    /// Show the activity of an attached volume, one line per interval
    ///
    /// The prefixes r, w and f stand for reads, writes and flushes, wb for write-back. rhit% is the
    /// share of the blocks read that the cache held. log% is the share of the log that still awaits
    /// write-back. 50us and 99us are percentiles of the latency, in microseconds.
    ///
    /// A terminal of fewer than 126 columns shows only the most important ones.
    Stat(stat::Args),
    /// Watch an attached volume: latencies, rates, how full the log is. The key q quits
    ///
    /// The line `position` shows the cache device from its beginning to its end: █ still awaits
    /// write-back, ▶ is the newest segment, and · may be overwritten.
    Top(top::Args),
    /// Make all data written to an attached volume survive a power cut
    Flush {
        /// The volume
        name: VolumeName,
    },
    /// Write all dirty data of an attached volume back to its backing device
    ///
    /// Shows progress on a terminal. You can interrupt it (Ctrl-C) and repeat it: data already
    /// written back stays written back, and the volume keeps working.
    Drain {
        /// The volume
        name: VolumeName,
    },
    /// Pause write-back of an attached volume, until `wbctl resume` or the next attach
    ///
    /// Meanwhile, all writes stay in the cache. Use it to keep a disk quiet while something else
    /// needs it. A drain or a full log still causes write-back. The command waits up to 10 seconds
    /// for the current batch of write-back, and says so if that takes longer.
    Pause {
        /// The volume
        name: VolumeName,
    },
    /// End a pause
    Resume {
        /// The volume
        name: VolumeName,
    },
    /// Go on serving a volume with the program that is installed now
    ///
    /// Programs that use the volume wait for a moment. If the installed program cannot go on, the
    /// volume stays with the one that serves it.
    Restart {
        /// The volume
        name: VolumeName,
    },
    /// Reset all counters of an attached volume
    ClearStats {
        /// The volume
        name: VolumeName,
    },
    /// Show the tunables of a volume: those in force, or, while it is detached, the recorded ones
    Get(tune::GetArgs),
    /// Change tunables of an attached volume, from now on
    Set(tune::SetArgs),
    /// Forget a volume that is detached and has no dirty data. Its devices stay as they are
    Remove(remove::Args),
    /// Import the volumes of the script `writeboost`: record what its table lists. Touches no
    /// device
    Import(import::Args),
    /// Write all dirty data back to the backing device offline, and mark the cache clean
    ///
    /// Serves nothing, and needs no root for plain files. You can interrupt and repeat it at any
    /// time.
    Replay(replay::Args),
    /// Add wb's extension to a cache device of the kernel module, in place
    ///
    /// The extension consists of: an identity; a pairing with the backing device, so that wb
    /// refuses a wrong one; a CRC of every block written from then on.
    ///
    /// The contents of the cache stay as they are, and the kernel module can still read them.
    Upgrade(upgrade::Args),
    /// A task that a daemon delegates to another process
    #[command(hide = true)]
    Apart(apart::Args),
}

/// The command line, as it is parsed and documented.
pub fn command() -> clap::Command {
    Cli::command()
}

/// The program.
pub fn main() -> ExitCode {
    // Whatever the umask was: others must not be able to write to records, notes, folders of links
    // and sockets.
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
        Command::Restart { name } => client::restart(&name, out)?,
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
