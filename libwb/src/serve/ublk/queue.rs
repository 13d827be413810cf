//! The queue of a ublk device. A write that RAM takes is answered without a task. Each other
//! request gets one, which begins in the same turn of the reactor.

use crate::format::{SECTOR_BYTES, Sector, to_u64, to_usize};
use crate::reactor::{Command, Handle, Server, Target};
use crate::runtime::{Runtime, thread};
use crate::serve::request::{Answer, Outcome, Request, carry_out, write};
use crate::serve::{Owner, ServeError, Volume, failed};
use crate::sys::{Description, Descriptions, LazyBuffer, open_queue, submit_all};
use byteorder::{ByteOrder, NativeEndian};
use event_listener::Event;
use futures_util::future::{BoxFuture, Either, poll_immediate, select};
use nix::errno::Errno;
use std::fs::File;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// The command that waits for the first request under a tag: `UBLK_U_IO_FETCH_REQ`.
const FETCH: u32 = 0xc010_7520;
/// The command that answers a request, and waits for the next: `UBLK_U_IO_COMMIT_AND_FETCH_REQ`.
const ANSWER_AND_FETCH: u32 = 0xc010_7521;

/// Tags: requests that the kernel passes on at a time. They are many, so that reads that wait for a
/// slow disk seldom take all of them.
pub(super) const DEPTH: u16 = 128;
/// The largest request in bytes. Each tag has a buffer of this size, which takes memory once a
/// request is as large.
pub(super) const MAX_REQUEST: u32 = 128 << 10;

/// What ends all requests of a queue, whatever its volume is.
pub(super) trait Abort: Send + Sync {
    fn abort(&self);
    /// Takes and answers no more requests.
    fn hold(&self);
}

/// What the kernel asks for under a tag.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// To write this many bytes from the tag's buffer.
    Write {
        sector: Sector,
        length: usize,
        fua: bool,
    },
    Other(Request),
}

/// Understands a description. A request must fit the tag's buffer.
fn understand(asked: &Description) -> Result<Asked, Errno> {
    const READ: u32 = 0;
    const WRITE: u32 = 1;
    const FLUSH: u32 = 2;
    const DISCARD: u32 = 3;
    const WRITE_ZEROES: u32 = 5;
    const FUA: u32 = 1 << 13;
    const KEEPS_SPACE: u32 = 1 << 15; // NOUNMAP
    let sector = Sector(asked.sector);
    let bytes = u64::from(asked.sectors) * to_u64(SECTOR_BYTES);
    let in_buffer = || match bytes <= u64::from(MAX_REQUEST) {
        true => Ok(to_usize(bytes)),
        false => Err(Errno::EINVAL),
    };
    Ok(match asked.operation & 0xff {
        READ => Asked::Other(Request::Read { sector, length: in_buffer()? }),
        WRITE => {
            let fua = asked.operation & FUA != 0;
            Asked::Write { sector, length: in_buffer()?, fua }
        }
        FLUSH => Asked::Other(Request::Flush),
        WRITE_ZEROES if asked.operation & KEEPS_SPACE != 0 => {
            Asked::Other(Request::Zero { sector, length: bytes })
        }
        DISCARD | WRITE_ZEROES => Asked::Other(Request::Discard { sector, length: bytes }),
        _ => return Err(Errno::EOPNOTSUPP),
    })
}

/// How far a request has come. Lengths are in bytes.
enum Performed {
    Now(Result<usize, Errno>),
    Later { work: BoxFuture<'static, Outcome>, written: usize },
}

/// What a command says about a tag of queue 0, in the form of `struct ublksrv_io_cmd`.
fn argument(tag: u16, result: i32, buffer: u64) -> [u8; 16] {
    let mut argument = [0; 16];
    NativeEndian::write_u16(&mut argument[2..], tag);
    NativeEndian::write_i32(&mut argument[4..], result);
    NativeEndian::write_u64(&mut argument[8..], buffer);
    argument
}

/// A command about a tag.
fn command(tag: u16, code: u32, result: i32, buffer: LazyBuffer) -> Command {
    let argument = argument(tag, result, to_u64(buffer.as_ptr().addr()));
    Command { tag, code, argument, buffer }
}

/// Serves all tags of a device that is not started, and ends that at once: a takeover that has
/// begun can be begun again after that.
pub(super) fn serve_for_a_moment(number: u32, file: File) -> Result<(), ServeError> {
    let cannot = format!("cannot end an earlier takeover of ublk device {number}");
    // No request comes, so one buffer will do.
    let buffer = LazyBuffer::new(to_usize(MAX_REQUEST.into())).map_err(failed(cannot.clone()))?;
    let address = to_u64(buffer.as_ptr().addr());
    let arguments: Vec<_> = (0..DEPTH).map(|tag| argument(tag, 0, address)).collect();
    // The driver takes the device for abandoned when the thread has ended that served it.
    let served = thread("wb-moment").spawn(move || submit_all(&file, FETCH, &arguments));
    let served = served.map_err(failed(cannot.clone()))?.join();
    served.unwrap_or_else(|_| Err(Errno::EIO.into())).map_err(failed(cannot))
}

/// The command that answers a request.
fn answer(tag: u16, done: Result<usize, Errno>, buffer: LazyBuffer) -> Command {
    let result = match done {
        // At most MAX_REQUEST.
        Ok(bytes) => i32::try_from(bytes).unwrap_or(i32::MAX),
        Err(errno) => -(errno as i32),
    };
    command(tag, ANSWER_AND_FETCH, result, buffer)
}

impl<V: Volume> Server for Queue<V> {
    fn completed(self: Arc<Self>, command: Command, ended: Result<(), Errno>) -> Option<Command> {
        let Command { tag, mut buffer, .. } = command;
        if let Err(errno) = ended {
            self.ends(errno);
            return None;
        }
        if self.is_held.load(Ordering::SeqCst) {
            return None;
        }
        match self.perform(&self.descriptions.get(tag), &mut buffer) {
            Performed::Now(done) => Some(answer(tag, done, buffer)),
            Performed::Later { work, written } => {
                self.runtime.clone().run_now(async move {
                    let done = self.finish(work, written, &mut buffer).await;
                    if self.is_held.load(Ordering::SeqCst) {
                        return;
                    }
                    let runtime = self.runtime.clone();
                    let device = self.device.clone();
                    runtime.serve(&device, &self, [answer(tag, done, buffer)]);
                });
                None
            }
        }
    }
}

pub(super) struct Queue<V> {
    volume: V,
    runtime: Handle,
    device: Target,
    descriptions: Descriptions,
    is_aborted: AtomicBool,
    aborted: Event,
    is_held: AtomicBool,
    /// Why the tags get no more requests, once one gets none.
    end: OnceLock<Errno>,
    /// The device has started, so that its end is told.
    has_started: AtomicBool,
    is_told: AtomicBool,
    owner: Box<dyn Owner>,
}

impl<V: Volume> Queue<V> {
    /// Serves a device's requests, until the device is stopped.
    pub(super) fn serve(
        volume: V,
        runtime: &Handle,
        number: u32,
        owner: impl Owner,
    ) -> Result<Arc<Self>, ServeError> {
        let file = open_queue(number).map_err(failed(format!("cannot open /dev/ublkc{number}")))?;
        let descriptions =
            Descriptions::map(&file, DEPTH).map_err(failed("cannot map the ublk queue"))?;
        let buffers: Vec<LazyBuffer> = (0..DEPTH)
            .map(|_| LazyBuffer::new(to_usize(MAX_REQUEST.into())))
            .collect::<Result<_, _>>()
            .map_err(failed("cannot map the buffers of the ublk queue"))?;
        let queue = Arc::new(Queue {
            volume,
            runtime: runtime.clone(),
            device: Target::new(file),
            descriptions,
            is_aborted: AtomicBool::new(false),
            aborted: Event::new(),
            is_held: AtomicBool::new(false),
            end: OnceLock::new(),
            has_started: AtomicBool::new(false),
            is_told: AtomicBool::new(false),
            owner: Box::new(owner),
        });
        // Together: the driver cannot put away a part, if this process is killed in between.
        let fetches = (0..DEPTH).zip(buffers);
        let fetches = fetches.map(|(tag, buffer)| command(tag, FETCH, 0, buffer));
        runtime.serve(&queue.device, &queue, fetches);
        Ok(queue)
    }

    /// Performs a request, or begins to.
    fn perform(&self, asked: &Description, buffer: &mut LazyBuffer) -> Performed {
        if self.is_aborted.load(Ordering::SeqCst) {
            return Performed::Now(Err(Errno::EIO));
        }
        match understand(asked) {
            Ok(Asked::Write { sector, length, fua }) => {
                match write(&self.volume, sector, &buffer[..length], fua) {
                    Answer::Ready(outcome) => Performed::Now(outcome.map(|_| length)),
                    Answer::Later(work) => Performed::Later { work, written: length },
                }
            }
            Ok(Asked::Other(request)) => {
                let work = Box::pin(carry_out(self.volume.clone(), request));
                Performed::Later { work, written: 0 }
            }
            Err(errno) => Performed::Now(Err(errno)),
        }
    }

    /// Waits for what [`Queue::perform`] began. Returns how many bytes were read or written.
    async fn finish(
        &self,
        work: BoxFuture<'static, Outcome>,
        written: usize,
        buffer: &mut LazyBuffer,
    ) -> Result<usize, Errno> {
        let Some(data) = self.unless_aborted(work).await? else { return Ok(written) };
        buffer[..data.len()].copy_from_slice(&data);
        Ok(data.len())
    }

    /// Waits for the outcome of a request. If the device is cut off meanwhile, the request goes on,
    /// but its user gets an error.
    async fn unless_aborted(&self, mut work: BoxFuture<'static, Outcome>) -> Outcome {
        if let Some(outcome) = poll_immediate(&mut work).await {
            return outcome;
        }
        let aborted = self.aborted.listen();
        if self.is_aborted.load(Ordering::SeqCst) {
            self.runtime.spawn(Box::pin(async move { drop(work.await) }));
            return Err(Errno::EIO);
        }
        match select(work, pin!(aborted)).await {
            Either::Left((outcome, _)) => outcome,
            Either::Right(((), work)) => {
                self.runtime.spawn(Box::pin(async move { drop(work.await) }));
                Err(Errno::EIO)
            }
        }
    }

    /// A tag gets no more requests. The first such tag says why, even if the device was stopped.
    fn ends(&self, errno: Errno) {
        if self.end.set(errno).is_ok() {
            self.tell();
        }
    }
}

impl<V> Queue<V> {
    /// Tells the end of the device from now on. Until it has started, its maker sees the failure,
    /// and perhaps serves the volume in another way.
    pub(super) fn has_started(&self) {
        self.has_started.store(true, Ordering::SeqCst);
        self.tell();
    }

    /// Tells the end once, if there was one.
    fn tell(&self) {
        if let Some(errno) = self.end.get()
            && self.has_started.load(Ordering::SeqCst)
            && !self.is_told.swap(true, Ordering::SeqCst)
        {
            self.owner.lost(errno.desc());
        }
    }

    /// Whether the device gets no more requests.
    pub(super) fn has_ended(&self) -> bool {
        self.end.get().is_some()
    }
}

impl<V: Volume> Abort for Queue<V> {
    fn abort(&self) {
        self.is_aborted.store(true, Ordering::SeqCst);
        self.aborted.notify(usize::MAX);
    }

    fn hold(&self) {
        self.is_held.store(true, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn asked(operation: u32, sectors: u32) -> Description {
        Description { operation, sectors, sector: 8, address: 0 }
    }

    #[test]
    fn requests_are_understood_with_their_flags() {
        let sector = Sector(8);
        let write = |fua| Ok(Asked::Write { sector, length: 1024, fua });
        assert_eq!(understand(&asked(1, 2)), write(false));
        assert_eq!(understand(&asked(1 | 1 << 13, 2)), write(true));
        let other = |operation, request| {
            assert_eq!(understand(&asked(operation, 2)), Ok(Asked::Other(request)));
        };
        other(0, Request::Read { sector, length: 1024 });
        other(2, Request::Flush);
        other(3, Request::Discard { sector, length: 1024 });
        other(5, Request::Discard { sector, length: 1024 });
        other(5 | 1 << 15, Request::Zero { sector, length: 1024 });
        assert_eq!(understand(&asked(4, 2)), Err(Errno::EOPNOTSUPP));
    }

    #[test]
    fn a_request_that_does_not_fit_the_buffer_is_refused() {
        for operation in [0, 1] {
            assert!(understand(&asked(operation, MAX_REQUEST / 512)).is_ok());
            let too_long = understand(&asked(operation, MAX_REQUEST / 512 + 1));
            assert_eq!(too_long, Err(Errno::EINVAL));
        }
    }

    proptest! {
        #[test]
        fn no_description_is_too_strange(operation: u32, sectors: u32, sector: u64) {
            let asked = Description { operation, sectors, sector, address: u64::MAX };
            if let Ok(Asked::Write { length, .. } | Asked::Other(Request::Read { length, .. })) =
                understand(&asked)
            {
                prop_assert!(length <= to_usize(MAX_REQUEST.into()));
            }
        }
    }
}
