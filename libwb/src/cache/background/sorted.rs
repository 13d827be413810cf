//! The items of a batch in the order of their blocks. To sort hundreds of thousands takes tens of
//! milliseconds, and other tasks share the thread. So chunks are sorted one by one, and merged as
//! the items are taken.

use crate::cache::state::segment_log::Item;
use crate::format::BlockNo;
use crate::rules::{Rule, Rules};
use futures_lite::future::yield_now;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;

/// Items that are dealt with before other tasks run: about those of a segment.
pub(super) const CHUNK: usize = 128;

/// Sorts each chunk. Versions of the same block stay in their order.
pub(super) async fn sort_chunks(items: &mut [Item]) {
    for chunk in items.chunks_mut(CHUNK) {
        chunk.sort_by_key(|item| item.block);
        yield_now().await;
    }
}

/// Merges sorted chunks. Versions of the same block stay in their order.
pub(super) fn merged(items: &[Item], rules: Rules) -> impl Iterator<Item = &Item> {
    let is_stable = rules.keep(Rule::VersionsStayInOrder);
    // Of chunks that go on with the same block, the first one comes first.
    let head =
        move |block: BlockNo, nth: usize| Reverse((block, if is_stable { nth } else { !nth }));
    let mut chunks: Vec<&[Item]> = items.chunks(CHUNK).collect();
    let heads = chunks.iter().enumerate().map(|(nth, chunk)| head(chunk[0].block, nth));
    let mut heads: BinaryHeap<_> = heads.collect();
    std::iter::from_fn(move || {
        let mut least = heads.peek_mut()?;
        let Reverse((_, nth)) = *least;
        let nth = if is_stable { nth } else { !nth };
        let (item, rest) = chunks[nth].split_first()?;
        chunks[nth] = rest;
        match rest.first() {
            Some(next) => *least = head(next.block, nth),
            None => drop(PeekMut::pop(least)),
        }
        Some(item)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{DirtyBits, Place, Slot, to_u64};

    #[test]
    fn items_come_sorted_and_versions_of_a_block_in_their_order() {
        let count = 5 * CHUNK + 7;
        let item = |nth: usize| Item {
            // Scattered, and each some times.
            block: BlockNo(to_u64(nth) * 7919 % 1000),
            place: Place { slot: Slot(u32::try_from(nth).expect("small")), index: 0 },
            sectors: DirtyBits::ALL,
            discarded: false,
        };
        let mut items: Vec<Item> = (0..count).map(item).collect();
        let mut expected = items.clone();
        expected.sort_by_key(|item| item.block);
        futures_lite::future::block_on(sort_chunks(&mut items));
        let keys = |item: &Item| (item.block, item.place);
        let found: Vec<_> = merged(&items, Rules::default()).map(keys).collect();
        assert_eq!(found, expected.iter().map(keys).collect::<Vec<_>>());
    }
}
