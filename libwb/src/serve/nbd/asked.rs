//! What an NBD client asks for: whether that is in order, and how the volume does it.

use crate::format::{SECTOR_BYTES, Sector, to_u64, to_usize};
use crate::nbd::{Command, CommandFlags, MAX_PAYLOAD_BYTES, Request};
use crate::serve::request::{self, Answer, Outcome, carry_out};
use crate::serve::{MAX_DISCARD, Options, Volume};
use futures_lite::future::yield_now;
use nix::errno::Errno;

/// How many zeros are written at a time if a volume has no other way to zero a range.
pub(super) const ZEROS: usize = 64 << 10;

/// Something to do with a volume. Lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Read { sector: Sector, length: usize },
    Write { sector: Sector, fua: bool },
    Flush,
    Clear { sector: Sector, length: u64, how: Clear, fua: bool },
}

/// What becomes of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clear {
    /// It may read as anything.
    Trim,
    /// It reads as zeros.
    Zero,
    /// It reads as zeros and stays allocated.
    ZeroAndKeep,
}

/// Understands a request for a volume of `size` bytes. The request must not be one to disconnect.
pub(super) fn understand(request: &Request, size: u64, options: &Options) -> Result<Asked, Errno> {
    let known = match request.command {
        Command::Read => CommandFlags::DF,
        Command::WriteZeroes => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
        _ => CommandFlags::empty(),
    };
    // Some clients set it where it means nothing.
    if !(known | CommandFlags::FUA).contains(request.flags) {
        return Err(Errno::EINVAL);
    }
    let fua = request.flags.contains(CommandFlags::FUA);
    let how = match request.command {
        Command::Flush => return Ok(Asked::Flush),
        Command::Read => {
            let sector = range(request, size, Errno::EINVAL, options)?;
            let length = in_one_piece(request)?;
            return Ok(Asked::Read { sector, length });
        }
        Command::Write | Command::Trim | Command::WriteZeroes if options.read_only => {
            return Err(Errno::EPERM);
        }
        Command::Write => {
            let sector = range(request, size, Errno::ENOSPC, options)?;
            in_one_piece(request)?;
            return Ok(Asked::Write { sector, fua });
        }
        Command::WriteZeroes if request.flags.contains(CommandFlags::FAST_ZERO) => {
            return Err(Errno::EOPNOTSUPP);
        }
        Command::WriteZeroes if request.flags.contains(CommandFlags::NO_HOLE) => Clear::ZeroAndKeep,
        Command::WriteZeroes => Clear::Zero,
        Command::Trim => Clear::Trim,
        _ => return Err(Errno::EINVAL),
    };
    let beyond = if how == Clear::Trim { Errno::EINVAL } else { Errno::ENOSPC };
    let sector = range(request, size, beyond, options)?;
    Ok(Asked::Clear { sector, length: request.length.into(), how, fua })
}

/// The first sector of a range that is not empty, aligned, and within the volume.
fn range(request: &Request, size: u64, beyond: Errno, options: &Options) -> Result<Sector, Errno> {
    let (offset, length) = (request.offset, u64::from(request.length));
    let unit = u64::from(options.sector_size);
    if length == 0 || !offset.is_multiple_of(unit) || !length.is_multiple_of(unit) {
        return Err(Errno::EINVAL);
    }
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(Sector(offset / to_u64(SECTOR_BYTES))),
        _ => Err(beyond),
    }
}

/// The length of data that may be sent.
fn in_one_piece(request: &Request) -> Result<usize, Errno> {
    match request.length <= MAX_PAYLOAD_BYTES {
        true => Ok(to_usize(request.length.into())),
        false => Err(Errno::EINVAL),
    }
}

/// Does what is asked for. `data` is that of a write.
pub(super) fn perform<V: Volume>(volume: &V, asked: Asked, data: &[u8]) -> Answer {
    let volume_then = volume.clone();
    match asked {
        Asked::Write { sector, fua } => request::write(volume, sector, data, fua),
        Asked::Read { sector, length } => {
            let read = request::Request::Read { sector, length };
            Answer::Later(Box::pin(carry_out(volume_then, read)))
        }
        Asked::Flush => Answer::Later(Box::pin(carry_out(volume_then, request::Request::Flush))),
        Asked::Clear { sector, length, how, fua } => Answer::Later(Box::pin(async move {
            clear(&volume_then, sector, length, how).await?;
            match fua {
                true => carry_out(volume_then, request::Request::Flush).await,
                false => Ok(None),
            }
        })),
    }
}

/// Clears a range, piece by piece, so that other requests wait for a piece at most.
async fn clear<V: Volume>(volume: &V, sector: Sector, length: u64, how: Clear) -> Outcome {
    for (sector, length) in pieces(sector, length, MAX_DISCARD) {
        let piece = match how {
            Clear::Trim | Clear::Zero => request::Request::Discard { sector, length },
            Clear::ZeroAndKeep => request::Request::Zero { sector, length },
        };
        match (carry_out(volume.clone(), piece).await, how) {
            // The client only said that it needs the data no more.
            (Err(Errno::EOPNOTSUPP), Clear::Trim) => return Ok(None),
            (Err(Errno::EOPNOTSUPP), _) => write_zeros(volume, sector, length).await?,
            (cleared, _) => drop(cleared?),
        }
    }
    Ok(None)
}

async fn write_zeros<V: Volume>(volume: &V, sector: Sector, length: u64) -> Result<(), Errno> {
    let zeros = vec![0; ZEROS.min(to_usize(length))];
    for (sector, length) in pieces(sector, length, to_u64(ZEROS)) {
        match request::write(volume, sector, &zeros[..to_usize(length)], false) {
            Answer::Ready(written) => drop(written?),
            Answer::Later(rest) => drop(rest.await?),
        }
        yield_now().await;
    }
    Ok(())
}

/// Pieces of at most `most` bytes.
fn pieces(sector: Sector, length: u64, most: u64) -> impl Iterator<Item = (Sector, u64)> {
    let starts = (0..length).step_by(to_usize(most));
    starts.map(move |at| (Sector(sector.0 + at / to_u64(SECTOR_BYTES)), most.min(length - at)))
}
