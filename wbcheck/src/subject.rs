//! What a check works on: the cache device, opened, and the backing device that belongs to it.

use crate::args::Args;
use anyhow::{Result, bail};
use libwb::cli::{Io, refuse_in_the_clear};
use libwb::device::Device;
use libwb::device::probe::{Access, open};
use libwb::device::signatures;
use libwb::format::{SECTOR_BYTES, SuperblockFault, to_u64};
use libwb::log::pairing::{BackingFacts, check_pairing};
use libwb::log::segment_writes::write_magic;
use libwb::log::superblock::{RawSuperblock, examine_superblock};
use libwb::log::{LogError, LogErrorKind, Use};

/// The backing device that the log is checked against.
#[derive(Clone)]
pub(crate) struct Backing {
    /// Its name in messages.
    pub(crate) name: String,
    pub(crate) sectors: u64,
    /// Its serial number or another identity, perhaps empty; `None` if the device is only recorded.
    pub(crate) identity: Option<String>,
}

impl Backing {
    pub(crate) fn facts(&self) -> BackingFacts<'_> {
        BackingFacts {
            name: &self.name,
            sectors: self.sectors,
            identity: self.identity.as_deref().unwrap_or_default(),
        }
    }
}

/// What a check works on.
pub(crate) struct Subject {
    pub(crate) io: Io,
    pub(crate) device: Device,
    pub(crate) superblock: RawSuperblock,
    pub(crate) backing: Option<Backing>,
    /// What was wrong with the magic before it was rewritten.
    pub(crate) damaged_magic: Option<SuperblockFault>,
}

impl Subject {
    /// Opens the devices, and reads the superblock. With --repair, it rewrites a damaged magic.
    pub(crate) fn open(args: &Args) -> Result<Subject> {
        let io = Io::start()?;
        let access = if args.repair { Access::Write } else { Access::Read };
        let (opened, backing) = match &args.backing {
            None => (open(&args.cache, access)?, None),
            // Only its size matters, so it may be in use.
            Some(at) => {
                refuse_in_the_clear(at, args.insecure)?;
                let (opened, backing) =
                    io.open_pair(&args.cache, at, [access, Access::ReadUnlocked])?;
                let sectors = backing.device.size() / to_u64(SECTOR_BYTES);
                let identity = Some(backing.device.identity().into());
                (opened, Some(Backing { name: at.to_string(), sectors, identity }))
            }
        };
        let device = io.serve(opened);
        let superblock = io.block_on(examine_superblock(&device))?;
        if let Err(fault) = superblock.magic {
            refuse_other_than_damaged(
                args,
                &superblock,
                LogError::new(&device, LogErrorKind::Superblock { fault }),
            )?;
        }
        superblock.check_extension(&device, if args.repair { Use::Write } else { Use::Read })?;
        if let (Some(extension), Some(backing)) = (superblock.extension(), &backing) {
            check_pairing(&device, extension, &backing.facts())?;
        }
        let recorded = superblock.extension().filter(|extension| extension.backing_sectors != 0);
        let recorded = recorded.map(|extension| Backing {
            name: "the backing device it was made for".into(),
            sectors: extension.backing_sectors,
            identity: None,
        });
        let backing = backing.or(recorded);
        let damaged_magic = superblock.magic.err();
        let mut subject = Subject { io, device, superblock, backing, damaged_magic };
        if subject.damaged_magic.is_some() {
            subject.restore_magic()?;
        }
        Ok(subject)
    }

    /// Reads the superblock again, after it was changed.
    pub(crate) fn read_superblock(&mut self) -> Result<()> {
        self.superblock = self.io.block_on(examine_superblock(&self.device))?;
        Ok(())
    }

    /// Writes the magic anew on a cache device that lacks it, so that the rest can be checked.
    fn restore_magic(&mut self) -> Result<()> {
        self.io.block_on(async {
            write_magic(&self.device).await?;
            self.device.flush().await
        })?;
        self.read_superblock()
    }
}

/// Refuses a device without the magic, unless it is a cache anyway and is to be repaired.
fn refuse_other_than_damaged(
    args: &Args,
    superblock: &RawSuperblock,
    error: LogError,
) -> Result<()> {
    let signature = signatures::find(&args.cache).ok().flatten();
    match (superblock.extension(), signature) {
        (None, None) => Err(error.into()),
        (None, Some(signature)) => bail!("{error}; it holds: {signature}"),
        (Some(_), Some(signature)) => bail!(
            "{error}; it holds: {signature}. Yet it was formatted as a cache. If you still need \
             the cache, copy the device, wipe what was put on it (wipefs --all), then use wbcheck \
             --repair"
        ),
        (Some(_), None) if !args.repair => bail!(
            "{error}; yet it was formatted as one, so its first bytes are damaged: copy it, then \
             use wbcheck --repair, which rewrites them"
        ),
        (Some(_), None) => Ok(()),
    }
}
