//! What a plan does and gives up, in words and as a record for JSON.

use super::mode::SalvageMode;
use super::plan::{Certainty, GivenUp, Plan};
use crate::format::{BlockNo, SegmentId, to_u64};
use serde::Serialize;

/// Items of a list that are shown one by one.
const SHOWN: usize = 10;

/// What a cache gives up that has lost both copies of the superblock extension.
const LOST_PAIRING: &str =
    "gives up the cache's UUID, its label, and what shows that the backing device is the right one";

/// What a way on gives up. The names are part of the programs' interface.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The way on; null for a repair.
    #[serde(rename = "way")]
    pub mode: Option<SalvageMode>,
    /// The last segment of the log afterwards.
    pub recovery_point: u64,
    /// The segments that are given up, whole or in part.
    pub segments_given_up: Vec<u64>,
    /// Those of them of which it is not known for sure what they held.
    pub segments_uncertain: Vec<u64>,
    /// Slots whose content is given up though it cannot be told which segment it is.
    pub slots_given_up: Vec<u32>,
    /// How many dirty blocks are given up, as far as is known.
    pub dirty_blocks_given_up: u64,
    /// Which, in units of 4096 bytes of the backing device.
    pub blocks_given_up: Vec<u64>,
    /// How many dirty blocks of damaged segments are kept.
    pub dirty_blocks_kept: u64,
    /// What the superblock record says, where it is not believed.
    pub disbelieved_record: Option<u64>,
}

impl Plan {
    /// What is given up.
    pub fn summary(&self) -> Summary {
        let ids =
            |wanted: fn(&GivenUp) -> bool| self.ids(wanted).into_iter().map(|id| id.0).collect();
        Summary {
            mode: self.mode,
            recovery_point: self.point.0,
            segments_given_up: ids(|_| true),
            segments_uncertain: ids(|lost| lost.certainty != Certainty::Sure),
            slots_given_up: self.nameless().map(|lost| lost.slot.0).collect(),
            dirty_blocks_given_up: to_u64(self.blocks().len()),
            blocks_given_up: self.blocks().iter().map(|block| block.0).collect(),
            dirty_blocks_kept: self.given_up.iter().map(|lost| lost.kept).sum(),
            disbelieved_record: self.rejected_record.map(|id| id.0),
        }
    }

    /// What is given up, as the rest of a sentence that begins with the plan.
    pub fn gives_up(&self) -> String {
        let ids = self.ids(|_| true);
        let mut what = Vec::new();
        if !ids.is_empty() {
            what.push(segments(&ids));
        }
        let slots: Vec<_> = self.nameless().map(|lost| lost.slot.to_string()).collect();
        if !slots.is_empty() {
            what.push(format!(
                "what stands in {} {}",
                noun(slots.len(), "slot"),
                shortened(&slots)
            ));
        }
        if what.is_empty() {
            return if self.pairs_anew { LOST_PAIRING.into() } else { "gives up nothing".into() };
        }
        let blocks = self.blocks();
        let unsure = self.given_up.iter().any(|lost| lost.certainty == Certainty::Perhaps);
        let mut text = format!(
            "gives up {}: {} dirty {}{}",
            what.join(" and "),
            blocks.len(),
            noun(blocks.len(), "block"),
            if unsure { ", as far as damaged headers can be trusted" } else { "" },
        );
        let kept: u64 = self.given_up.iter().map(|lost| lost.kept).sum();
        if kept > 0 {
            text += &format!(" ({kept} more of the same segments are kept)");
        }
        let unknown = self.ids(|lost| lost.certainty == Certainty::Unknown);
        if !unknown.is_empty() {
            text += &format!("; what {} held is not known", segments(&unknown));
        }
        if self.pairs_anew {
            text += &format!(". And it {LOST_PAIRING}");
        }
        text
    }

    /// The dirty blocks that are given up, as a short list; empty when none are known.
    pub fn blocks_text(&self) -> String {
        shortened(&self.blocks().iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    /// What is written, one thing each.
    pub fn changes(&self) -> Vec<String> {
        let (mut emptied, mut erased, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        for change in self.slot_plan.all_changes() {
            let partly = self.given_up.iter().any(|lost| lost.slot == change.slot && lost.kept > 0);
            match change.id {
                SegmentId::NONE => erased.push(change.slot.to_string()),
                id if partly => kept.push(id),
                id => emptied.push(id),
            }
        }
        let mut changes = Vec::new();
        if let Some(record) = self.record {
            changes.push(format!(
                "the superblock record: segment {} is the last written back",
                record.id
            ));
        }
        for (ids, what) in [
            (&mut kept, "the good blocks alone of"),
            (&mut emptied, "empty segments in the places of"),
        ] {
            ids.sort_unstable();
            if !ids.is_empty() {
                changes.push(format!("{what} {}", segments(ids)));
            }
        }
        if !self.misleading.is_empty() {
            changes.push(format!(
                "empty segments in the places of {}, from which the kernel module may take old \
                 data for new",
                segments(&self.misleading)
            ));
        }
        if !erased.is_empty() {
            changes.push(format!(
                "zeros over {} {}",
                noun(erased.len(), "slot"),
                shortened(&erased)
            ));
        }
        if let Some(id) = self.slot_plan.cut_short {
            changes.push(format!("the header of segment {id}, which ends with the last flush"));
        }
        if self.slot_plan.clear_clean_mark {
            changes.push("no more mark that the cache was closed in order".into());
        }
        if self.pairs_anew {
            let paired = self.pages.first().filter(|page| page.backing_sectors > 0);
            changes.push(format!(
                "a new superblock extension, with a new UUID that fits the segments, {}",
                paired.map_or_else(
                    || "for any backing device".into(),
                    |page| format!(
                        "paired with a backing device of {} sectors",
                        page.backing_sectors
                    )
                )
            ));
        }
        if let Some(bad) = self.bad_copy {
            changes.push(format!("the {bad} copy of the superblock extension, from the sound one"));
        }
        changes
    }

    fn ids(&self, wanted: fn(&GivenUp) -> bool) -> Vec<SegmentId> {
        let named = self.given_up.iter().filter(|lost| lost.id != SegmentId::NONE && wanted(lost));
        let mut ids: Vec<_> = named.map(|lost| lost.id).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    fn nameless(&self) -> impl Iterator<Item = &GivenUp> {
        self.given_up.iter().filter(|lost| lost.id == SegmentId::NONE)
    }

    fn blocks(&self) -> Vec<BlockNo> {
        let mut blocks: Vec<_> =
            self.given_up.iter().flat_map(|lost| lost.blocks.iter().copied()).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }
}

/// What to do about a corrupt log: the ways on and what each gives up, one line each. `option` is
/// how the program is told to take one.
pub fn salvage_options(plans: &[Plan], option: &str) -> Vec<String> {
    let option_line = |plan: &Plan| {
        let what = match (plan.mode?, plan.point) {
            (SalvageMode::Skip, _) => {
                "keeps every valid segment; lost blocks fall back to older versions".into()
            }
            (SalvageMode::Stop, SegmentId::NONE) => {
                "goes back to an empty log, the last consistent point".into()
            }
            (SalvageMode::Stop, point) => {
                format!("goes back to segment {point}, the last consistent point")
            }
        };
        let record = plan.rejected_record.map(|record| {
            format!(
                ". It does not believe the superblock record ({record}): all that the log holds \
                 counts as dirty"
            )
        });
        Some(format!(
            "{option}={} {what}. It {}{}",
            plan.mode?,
            plan.gives_up(),
            record.unwrap_or_default()
        ))
    };
    plans.iter().filter_map(option_line).collect()
}

/// How many ways on there are, as a sentence without its end.
pub fn salvage_advice(plans: &[Plan]) -> &'static str {
    match plans.len() {
        0 => "nothing can be salvaged",
        1 => "salvage it",
        _ => "salvage it in one of two ways",
    }
}

/// "segment 7" or "segments 7 to 9, 12, ...", for ids in order, at least one.
pub fn segments(ids: &[SegmentId]) -> String {
    let runs = ids.chunk_by(|a, b| a.next() == *b);
    let parts = runs.map(|run| match run {
        [one] => one.to_string(),
        [first, .., last] => format!("{first} to {last}"),
        [] => String::new(),
    });
    format!("{} {}", noun(ids.len(), "segment"), shortened(&parts.collect::<Vec<_>>()))
}

fn shortened(items: &[String]) -> String {
    let more = if items.len() > SHOWN { ", ..." } else { "" };
    format!("{}{more}", items[..items.len().min(SHOWN)].join(", "))
}

fn noun(n: usize, noun: &str) -> String {
    if n == 1 { noun.into() } else { format!("{noun}s") }
}
