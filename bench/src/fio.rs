//! Workload from fio.

use crate::setup;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// What to do to a device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    /// In fio's words.
    pub(crate) pattern: &'static str,
    pub(crate) depth: u32,
}

#[derive(Deserialize)]
struct Output {
    jobs: Vec<Job>,
}

#[derive(Deserialize)]
struct Job {
    error: i32,
    read: Direction,
    write: Direction,
}

#[derive(Deserialize)]
struct Direction {
    iops: f64,
}

/// Applies a load of 4 KiB requests for some seconds. Returns requests per second.
pub(crate) fn run(device: &Path, load: Workload, seconds: u32) -> Result<f64> {
    let mut command = command(device, load.pattern, 4096, load.depth);
    // A short run-up keeps the start of both sides out of the figures.
    command
        .args(["--time_based", "--norandommap", "--ramp_time=500ms"])
        .arg(format!("--runtime={seconds}"));
    let job = finish(command)?;
    Ok(job.read.iops + job.write.iops)
}

/// Writes the whole device once.
pub(crate) fn fill(device: &Path) -> Result<()> {
    finish(command(device, "write", 1 << 20, 8)).map(drop)
}

fn command(device: &Path, pattern: &str, bytes: u32, depth: u32) -> Command {
    let mut command = Command::new("fio");
    command
        .args([
            "--name=wb-bench",
            "--ioengine=io_uring",
            "--direct=1",
            "--thread",
            "--randrepeat=0",
        ])
        .arg(format!("--filename={}", device.display()))
        .arg(format!("--rw={pattern}"))
        .arg(format!("--bs={bytes}"))
        .arg(format!("--iodepth={depth}"))
        .arg("--output-format=json")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command
}

fn finish(mut command: Command) -> Result<Job> {
    let mut running = Running(command.spawn().context("cannot run fio; is it installed?")?);
    let mut stdout = running.0.stdout.take().context("fio has no output")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    while running.0.try_wait()?.is_none() {
        setup::check_signals()?;
        std::thread::sleep(Duration::from_millis(20));
    }
    let text = reader.join().map_err(|_| anyhow::anyhow!("fio's output cannot be read"))??;
    // Warnings may come first.
    let json = text.find('{').map_or("", |at| &text[at..]);
    let output: Output = serde_json::from_str(json).with_context(|| format!("fio said: {text}"))?;
    match output.jobs.into_iter().next() {
        Some(job) if job.error == 0 => Ok(job),
        Some(job) => bail!("fio failed: {}", std::io::Error::from_raw_os_error(job.error)),
        None => bail!("fio said: {text}"),
    }
}

/// A process that does not outlive its handle.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
