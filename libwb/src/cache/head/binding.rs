//! Whose head it is.

use super::{Head, at};
use crate::format::{Geometry, SuperblockExtension, crc32c};
use crate::sys::boot_id;
use std::sync::atomic::Ordering;

const MAGIC: u64 = u64::from_le_bytes(*b"wb head\n");
const VERSION: u64 = 1;

/// The cache that a head belongs to, in the present boot of the system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    boot: [u64; 2],
    cache: [u64; 2],
    generation: u64,
    slots: u64,
}

impl Owner {
    pub(crate) fn new(geometry: Geometry, extension: Option<&SuperblockExtension>) -> Owner {
        let halves = |id: [u8; 16]| {
            let id = u128::from_le_bytes(id);
            [low(id), low(id >> 64)]
        };
        Owner {
            boot: halves(boot_id()),
            cache: extension.map_or([0; 2], |page| halves(page.uuid.into_bytes())),
            generation: extension.map_or(0, |page| page.generation),
            slots: geometry.slots().into(),
        }
    }

    #[cfg(all(test, feature = "sim"))]
    pub(super) fn of_another_boot(&mut self) {
        self.boot[0] ^= 1;
    }

    fn words(self) -> [u64; 7] {
        let Owner { boot, cache, generation, slots } = self;
        [VERSION, boot[0], boot[1], cache[0], cache[1], generation, slots]
    }
}

#[allow(clippy::cast_possible_truncation)] // that is the purpose
fn low(number: u128) -> u64 {
    number as u64
}

fn checksum(words: &[u64]) -> u64 {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    crc32c(&bytes).into()
}

impl Head {
    /// Whether no cache had it yet.
    pub fn is_blank(&self) -> bool {
        self.word(at::MAGIC) == 0
    }

    /// Whether it is of this cache.
    ///
    /// # Errors
    /// Says what is wrong.
    pub(crate) fn check(&self, owner: Owner) -> Result<(), String> {
        let starts = [
            at::VERSION,
            at::BOOT,
            at::BOOT + 8,
            at::CACHE,
            at::CACHE + 8,
            at::GENERATION,
            at::SLOTS,
        ];
        let words = starts.map(|at| self.word(at));
        let [version, boot @ .., generation, slots] = words;
        let [boot, cache] = [[boot[0], boot[1]], [boot[2], boot[3]]];
        let wrong = if self.word(at::MAGIC) != MAGIC {
            "it has no magic number"
        } else if version != VERSION {
            return Err(format!("its version is {version}, and this program knows {VERSION}"));
        } else if self.word(at::CHECKSUM) != checksum(&words) {
            "its checksum is wrong"
        } else if boot != owner.boot {
            "it is of another boot of the system"
        } else if cache != owner.cache || slots != owner.slots {
            "it is of another cache"
        } else if generation != owner.generation {
            "the cache was opened or closed by another program since"
        } else {
            return Ok(());
        };
        Err(wrong.into())
    }

    /// Gives it to a cache.
    pub(crate) fn bind(&self, owner: Owner) {
        let words = owner.words();
        self.memory.store(at::MAGIC, 0);
        for (nth, word) in words.into_iter().enumerate() {
            self.memory.store(at::VERSION + 8 * nth, word);
        }
        self.memory.store(at::CHECKSUM, checksum(&words));
        self.memory.store(at::MAGIC, MAGIC);
    }

    fn word(&self, at: usize) -> u64 {
        self.memory.word(at).load(Ordering::Acquire)
    }
}
