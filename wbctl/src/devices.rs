//! Notices that files or devices of an attached volume were deleted or replaced. Data written to
//! the open ones vanishes with the daemon, and nothing else would tell.

use anyhow::{Context, Result, bail};
use libwb::cli::human_size;
use libwb::device::probe::{Identity, Opened, identity};
use libwb::device::{Gone, Watched};
use libwb::format::{BLOCK_BYTES, to_u64};
use libwb::runtime::thread;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How long a filesystem may take to resolve a path. One that hangs must not block the status.
const SOON: Duration = Duration::from_secs(1);
/// The maximum number of lookups at a time, including those that hang.
const MAX_LOOKS: usize = 64;

/// The two devices of an attached volume.
#[derive(Clone)]
pub(crate) struct Devices(Arc<Both>);

struct Both {
    cache: Watched,
    /// One on a server is not watched: its client notices a change.
    backing: Option<Watched>,
    /// The block device. A name such as /dev/disk/by-uuid leads to it while the volume is attached,
    /// and back to the backing device after that.
    served: OnceLock<Identity>,
    looks: AtomicUsize,
}

/// What happened to each of them, if anything.
#[derive(Default)]
struct Found {
    cache: Option<Gone>,
    backing: Option<Gone>,
}

impl Both {
    fn gone(&self, device: &Watched) -> Option<Gone> {
        let leads_to_itself =
            || identity(device.path()).is_ok_and(|found| self.served.get() == Some(&found));
        device.gone().filter(|_| !leads_to_itself())
    }
}

impl Devices {
    pub(crate) fn of(cache: &Opened, backing: Option<Watched>) -> Result<Devices> {
        let cache = Watched::new(cache)
            .with_context(|| format!("cannot watch {}", cache.path.display()))?;
        let (served, looks) = (OnceLock::new(), AtomicUsize::new(0));
        Ok(Devices(Arc::new(Both { cache, backing, served, looks })))
    }

    /// Records the device under which the volume is served.
    pub(crate) fn served_as(&self, device: &Path) {
        if let Ok(served) = identity(device) {
            let _ = self.0.served.set(served);
        }
    }

    /// Checks both. If the check takes too long, it finds nothing.
    fn look(&self) -> Found {
        let (both, (done, found)) = (self.0.clone(), channel());
        if both.looks.fetch_add(1, Ordering::SeqCst) >= MAX_LOOKS {
            both.looks.fetch_sub(1, Ordering::SeqCst);
            return Found::default();
        }
        let look = move || {
            let backing = both.backing.as_ref().and_then(|backing| both.gone(backing));
            let _ = done.send(Found { cache: both.gone(&both.cache), backing });
            both.looks.fetch_sub(1, Ordering::SeqCst);
        };
        if thread("wb-look").spawn(look).is_err() {
            self.0.looks.fetch_sub(1, Ordering::SeqCst);
        }
        found.recv_timeout(SOON).unwrap_or_default()
    }

    /// What is wrong with them while they are in use, and what the user should do.
    pub(crate) fn troubles(&self) -> Vec<String> {
        let Found { cache, backing } = self.look();
        let cache = cache.map(|gone| {
            let path = self.0.cache.path().display();
            format!(
                "{path}: {gone} while the volume is attached: the data that is only in the cache \
                 will be lost when the daemon ends; write it back now (wbctl drain)"
            )
        });
        let backing = backing.zip(self.0.backing.as_ref()).map(|(gone, backing)| {
            let path = backing.path().display();
            format!(
                "{path}: {gone} while the volume is attached: the data written back will be lost \
                 when the daemon ends; copy all data from the volume before you detach it"
            )
        });
        cache.into_iter().chain(backing).collect()
    }

    /// At the end, with `dirty_blocks` dirty: fails if data was written to a file that is gone.
    pub(crate) fn refuse_gone(&self, dirty_blocks: u64) -> Result<()> {
        let Found { cache, backing } = self.look();
        let mut lost = Vec::new();
        if let Some(gone) = cache {
            let path = self.0.cache.path().display();
            match dirty_blocks {
                0 => tracing::warn!("{path}: {gone}; it held no dirty data"),
                blocks => lost.push(format!(
                    "{path}: {gone}: the data written to the cache {}, with {} that were only \
                     there",
                    fate(gone),
                    human_size(blocks * to_u64(BLOCK_BYTES))
                )),
            }
        }
        if let Some((gone, backing)) = backing.zip(self.0.backing.as_ref()) {
            let path = backing.path().display();
            lost.push(format!("{path}: {gone}: the data written back {}", fate(gone)));
        }
        if lost.is_empty() {
            return Ok(());
        }
        bail!("{}", lost.join("; "))
    }
}

/// What happens to the data written to it.
fn fate(gone: Gone) -> &'static str {
    match gone {
        Gone::Deleted => "is gone with it",
        Gone::Replaced(_) | Gone::Moved(_) => "is only in the one that was open",
    }
}
