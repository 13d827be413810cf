//! Any scribble over the log's head: the engine goes on with it or refuses it, and never panics,
//! loops, or writes to a device when it refuses.

use crate::sim::devices::{fresh_backing, fresh_cache};
use libwb::cache::{Cache, Head, OpenOptions};
use libwb::device::MemDevice;
use libwb::device::sim::Simulation;
use libwb::format::{BLOCK_BYTES, BlockNo, to_u64, to_usize};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

const SEGMENTS: u64 = 6;
const BLOCKS: u64 = 400;
/// Bytes of a change: where, and what is stored there.
const CHANGE: usize = 11;
/// No more changes than this are made.
const MOST: usize = 32;

/// What a process has left that died with work under way.
struct Left {
    cache: Vec<u8>,
    backing: Vec<u8>,
    /// Pages of the head that are not zeros, and where they are.
    head: Vec<(u64, Vec<u8>)>,
}

fn left() -> &'static Left {
    static LEFT: OnceLock<Left> = OnceLock::new();
    LEFT.get_or_init(|| {
        let head = Head::create().expect("memory");
        let rig = Rig::on(fresh_cache(SEGMENTS, true), fresh_backing(8 * BLOCKS));
        let cache = rig.open(&head).expect("a new cache");
        rig.run(async {
            cache.pause();
            let block = |n: u64| [u8::try_from(n % 250).expect("a byte"); BLOCK_BYTES];
            for n in 0..150 {
                cache.write(BlockNo(n).sector(), &block(n)).await.expect("written");
            }
            cache.flush().await.expect("flushed");
            for n in 140..170 {
                cache.write(BlockNo(n).sector(), &block(n + 1)).await.expect("written");
            }
            cache.discard(BlockNo(5).sector(), 4 * to_u64(BLOCK_BYTES)).await.expect("discarded");
        });
        let page = |at| {
            let mut page = vec![0; BLOCK_BYTES];
            let read = memory(&head).read_at(&mut page, at).expect("memory");
            (read > 0).then_some((at, page))
        };
        let pages = (0..).step_by(BLOCK_BYTES).map_while(page);
        Left {
            cache: rig.cache.content(),
            backing: rig.backing.content(),
            head: pages.filter(|(_, page)| page.iter().any(|&byte| byte != 0)).collect(),
        }
    })
}

fn memory(head: &Head) -> File {
    head.descriptor().try_clone_to_owned().expect("a descriptor").into()
}

/// The word of the head that a change goes to, by its number: each that is not the data of a block.
fn place(number: u16) -> u64 {
    const FRAMES_AT: u64 = 4 * 4096;
    let number = u64::from(number);
    let others =
        (0..12).map(|word| 8 * word).chain([4096, 4104]).chain((0..4).map(|n| 12288 + 8 * n));
    let others: Vec<u64> = others.collect();
    match others.get(to_usize(number)) {
        Some(at) => *at,
        None => {
            let number = number - to_u64(others.len());
            let (frame, word) = (number / 129 % 12, number % 129);
            let within = if word < 2 { 8 * word } else { 64 + 8 * (word - 2) };
            FRAMES_AT + frame * (512 << 10) + within
        }
    }
}

/// Takes any bytes as changes to the head that a process has left, and has another one go on.
///
/// # Panics
/// When the engine does, or changes a device though it refuses the head.
pub fn head(bytes: &[u8]) {
    let left = left();
    let head = Head::create().expect("memory");
    let memory = memory(&head);
    for (at, page) in &left.head {
        memory.write_all_at(page, *at).expect("memory");
    }
    for change in bytes.chunks_exact(CHANGE).take(MOST) {
        let at = place(u16::from_le_bytes([change[0], change[1]]));
        let mut word = [0; 8];
        word.copy_from_slice(&change[3..]);
        if change[2] & 1 == 1 {
            let mut before = [0; 8];
            memory.read_exact_at(&mut before, at).expect("memory");
            word.iter_mut().zip(before).for_each(|(byte, before)| *byte ^= before);
        }
        memory.write_all_at(&word, at).expect("memory");
    }
    let rig = Rig::on(left.cache.clone(), left.backing.clone());
    let Some(cache) = rig.open(&head) else {
        assert!(rig.cache.content() == left.cache, "refused, and changed");
        assert!(rig.backing.content() == left.backing, "refused, and written to");
        return;
    };
    rig.run(async {
        // A scribbled head may hold that the cache device has failed.
        let _ = cache.write(BlockNo(7).sector(), &[9; BLOCK_BYTES]).await;
        let _ = cache.flush().await;
        let _ = cache.drain().await;
        let _ = cache.close().await;
    });
}

struct Rig {
    simulation: Simulation,
    cache: Arc<MemDevice>,
    backing: Arc<MemDevice>,
}

impl Rig {
    fn on(cache: Vec<u8>, backing: Vec<u8>) -> Rig {
        Rig {
            simulation: Simulation::new(1),
            cache: Arc::new(MemDevice::with_content("cache", cache)),
            backing: Arc::new(MemDevice::with_content("backing", backing)),
        }
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.simulation.block_on(future).expect("an end")
    }

    fn open(&self, head: &Head) -> Option<Cache> {
        let head = head.descriptor().try_clone_to_owned().and_then(Head::open).expect("a head");
        let runtime = Arc::new(self.simulation.runtime().clone());
        let options = OpenOptions::serve().head(head);
        self.run(Cache::open(self.cache.clone(), self.backing.clone(), runtime, options)).ok()
    }
}
