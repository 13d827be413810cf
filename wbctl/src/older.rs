//! Refuses a cache that is older than when wb last saw it. Its data may be older than that of the
//! backing device, and nothing on it says so.

use crate::notes::Note;
use anyhow::{Result, anyhow, bail};
use libwb::cache::CacheError;
use libwb::cli::Io;
use libwb::device::Device;
use libwb::format::{PageFault, SuperblockExtension};
use libwb::log::reach::Reach;
use libwb::log::superblock::{RawSuperblock, examine_superblock};
use libwb::log::{LogError, LogErrorKind};

/// What wb knows about a cache before it uses it.
pub(crate) struct Past {
    /// Its identity, if it has one.
    pub(crate) uuid: Option<String>,
    note: Option<Note>,
    /// A page of its superblock is damaged; it may have been the newer one.
    is_torn: bool,
    /// The least that its log must have reached, if that is known.
    pub(crate) reach: Option<Reach>,
}

impl Past {
    /// Looks up the note about a cache, and refuses the cache if its superblock is older. With
    /// `anyway`, it refuses nothing. It reports to `warn` why it cannot look up the note.
    pub(crate) fn look_up(
        io: &Io,
        cache: &Device,
        anyway: bool,
        warn: impl Fn(String),
    ) -> Result<Past> {
        // Whoever opens the cache reports what is wrong with it.
        let superblock = io.block_on(examine_superblock(cache)).ok();
        let page = superblock.as_ref().and_then(RawSuperblock::extension);
        let uuid = page.map(|page| page.uuid.to_string());
        let mut past = Past { uuid, note: None, is_torn: false, reach: None };
        let (Some(superblock), Some(page), Some(uuid), false) =
            (&superblock, page, &past.uuid, anyway)
        else {
            return Ok(past);
        };
        past.note = Note::load(uuid).unwrap_or_else(|e| {
            warn(format!(
                "{e:#}; cannot tell whether {} is an older copy of the cache",
                cache.name()
            ));
            None
        });
        let Some(note) = &past.note else { return Ok(past) };
        past.is_torn = is_torn(superblock, page, note);
        if page.generation < note.generation && !past.is_torn {
            let (found, noted) = (page.generation, note.generation);
            bail!(refusal(
                cache.name(),
                note,
                &format!("its superblock is of generation {found}, but was of generation {noted}")
            ));
        }
        // A newer generation may come from a salvage, which gives up segments.
        let is_newer = page.generation > note.generation;
        past.reach = Some(if is_newer { note.reach().shortened() } else { note.reach() });
        Ok(past)
    }

    /// Turns an error from opening the cache into the message for the user.
    pub(crate) fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        match (error.downcast_ref(), &self.note) {
            (
                Some(CacheError::Log(LogError {
                    device,
                    kind: LogErrorKind::Older { found, known },
                })),
                Some(note),
            ) => {
                let torn =
                    if self.is_torn { "a page of its superblock is damaged, and " } else { "" };
                anyhow!(refusal(
                    device,
                    note,
                    &format!("{torn}its log is {found}, but was {known}")
                ))
            }
            _ => error,
        }
    }
}

/// Whether the missing page may only be damaged. Then the log tells how old the cache is.
fn is_torn(superblock: &RawSuperblock, page: &SuperblockExtension, note: &Note) -> bool {
    let is_damaged = |page: &Result<_, PageFault>| page.is_err();
    page.generation.checked_add(1) == Some(note.generation)
        && superblock.pages.iter().any(is_damaged)
}

fn refusal(device: &str, note: &Note, how: &str) -> String {
    format!(
        "{device}: refused: it is older than this cache was when wb last saw it: {how} ({}). It \
         is an earlier copy, or the device went back in time or lost its newest segments. Writing \
         it back could put old data over newer data. Use the newest one; --older uses this one \
         anyway",
        note.when()
    )
}
