//! Keeps the note about an attached cache up to date.

use crate::notes::{self, About};
use libwb::cache::Cache;
use libwb::log::reach::Seen;
use libwb::runtime::thread;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long the note may lag behind.
const INTERVAL: Duration = Duration::from_secs(10);

/// Updates the note about a cache at intervals, until it is told to finish.
pub(crate) struct Noting {
    stop: Sender<()>,
    thread: JoinHandle<Pen>,
}

struct Pen {
    cache: Cache,
    about: About,
    /// What was noted last.
    noted: Option<Seen>,
    /// The last write of the note failed, and the log says so.
    has_failed: bool,
}

impl Noting {
    /// Writes the first note soon. If the thread cannot start, it writes none.
    pub(crate) fn start(cache: Cache, about: About) -> Option<Noting> {
        let mut pen = Pen { cache, about, noted: None, has_failed: false };
        let (stop, stopped) = channel();
        let thread = thread("wb-notes").spawn(move || {
            pen.write(false);
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                if pen.cache.seen() != pen.noted {
                    pen.write(false);
                }
            }
            pen
        });
        let thread = thread.inspect_err(|e| {
            tracing::warn!("cannot keep the note about the cache up to date: {e}")
        });
        Some(Noting { stop, thread: thread.ok()? })
    }

    /// Writes the last note, which says whether the cache was closed.
    pub(crate) fn finish(self, closed: bool) {
        drop(self.stop);
        if let Ok(mut pen) = self.thread.join() {
            pen.write(closed);
        }
    }
}

impl Pen {
    fn write(&mut self, closed: bool) {
        let seen = self.cache.seen();
        let written = notes::note(&self.cache, &self.about, closed);
        if let (Err(e), false) = (&written, self.has_failed) {
            tracing::warn!("{e:#}");
        }
        self.has_failed = written.is_err();
        if written.is_ok() {
            self.noted = seen;
        }
    }
}
