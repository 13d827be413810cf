//! A request of a block device, whatever front end it came through.

use super::Volume;
use crate::cache::Timed;
use crate::device::IoBuf;
use crate::format::{SECTOR_BYTES, Sector, to_u64};
use futures_util::future::BoxFuture;
use nix::errno::Errno;
use std::time::Instant;

/// What is asked for. Lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read { sector: Sector, length: usize },
    Flush,
    Discard { sector: Sector, length: u64 },
    Zero { sector: Sector, length: u64 },
}

/// How a request ended, and the data of a read.
pub(super) type Outcome = Result<Option<IoBuf>, Errno>;

/// The outcome of a request, or a future of it, which owns all that it needs.
pub(super) enum Answer {
    Ready(Outcome),
    Later(BoxFuture<'static, Outcome>),
}

/// Carries out a request that sends no data.
pub(super) async fn carry_out<V: Volume>(volume: V, request: Request) -> Outcome {
    let started = Instant::now();
    match request {
        Request::Read { sector, length } => {
            let read = volume.read(sector, IoBuf::zeroed(length)).await;
            volume.took(Timed::Read, started.elapsed());
            read.map(Some)
        }
        Request::Flush => flush(&volume, started).await,
        Request::Discard { sector, length } => volume.discard(sector, length).await.map(|()| None),
        Request::Zero { sector, length } => volume.zero(sector, length).await.map(|()| None),
    }
}

async fn flush(volume: &impl Volume, started: Instant) -> Outcome {
    let flushed = volume.flush().await;
    volume.took(Timed::Flush, started.elapsed());
    flushed.map(|()| None)
}

/// Writes data, and makes it durable if `fua` ("force unit access") says so.
pub(super) fn write<V: Volume>(volume: &V, sector: Sector, data: &[u8], fua: bool) -> Answer {
    let started = Instant::now();
    let done = match volume.write_ready(sector, data) {
        Ok(done) => done,
        Err(errno) => return Answer::Ready(Err(errno)),
    };
    if done == data.len() && !fua {
        volume.took(Timed::Write, started.elapsed());
        return Answer::Ready(Ok(None));
    }
    let (volume, rest) = (volume.clone(), data[done..].to_vec());
    let sector = Sector(sector.0 + to_u64(done / SECTOR_BYTES));
    Answer::Later(Box::pin(async move {
        let written = if rest.is_empty() { Ok(()) } else { volume.write_rest(sector, rest).await };
        volume.took(Timed::Write, started.elapsed());
        match written {
            Ok(()) if fua => flush(&volume, started).await,
            written => written.map(|()| None),
        }
    }))
}
