//! What a plan does and gives up, as text and as a record for JSON.

use super::mode::SalvageMode;
use super::plan::{Certainty, GivenUp, Plan};
use crate::format::{BlockNo, SegmentId, to_u64};
use serde::Serialize;

/// How many items of a list to show.
const SHOWN: usize = 10;

/// What a cache gives up with both copies of the superblock extension.
const LOST_PAIRING: &str =
    "gives up the cache's UUID, its label, and what shows that the backing device is the right one";

/// What a plan gives up. The names in JSON are part of the programs' interface.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The mode of the salvage; null for a repair.
    #[serde(rename = "way")]
    pub mode: Option<SalvageMode>,
    /// The last segment of the log afterwards.
    pub recovery_point: u64,
    /// The segments given up, whole or in part.
    pub segments_given_up: Vec<u64>,
    /// Those of them whose content is not certain.
    pub segments_uncertain: Vec<u64>,
    /// Slots whose content is given up, but whose segment is unknown.
    pub slots_given_up: Vec<u32>,
    /// The number of dirty blocks given up, as far as it is known.
    pub dirty_blocks_given_up: u64,
    /// These blocks, in units of 4096 bytes of the backing device.
    pub blocks_given_up: Vec<u64>,
    /// The number of dirty blocks of damaged segments that are kept.
    pub dirty_blocks_kept: u64,
    /// The superblock record, if the plan rejects it.
    pub disbelieved_record: Option<u64>,
}

impl Plan {
    /// What the plan gives up.
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

    /// What the plan gives up, as a predicate: "gives up segment 7: ...".
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

    /// The dirty blocks given up, as a short list; empty if none are known.
    pub fn blocks_text(&self) -> String {
        shortened(&self.blocks().iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    /// What the plan writes, one item each.
    pub fn changes(&self) -> Vec<String> {
        let record = self.record.map(|record| {
            format!("the superblock record: segment {} is the last written back", record.id)
        });
        let cut_short = self
            .slot_plan
            .cut_short
            .map(|id| format!("the header of segment {id}, which ends with the last flush"));
        let mut changes: Vec<String> = record.into_iter().collect();
        changes.extend(self.slot_changes());
        changes.extend(cut_short);
        if self.slot_plan.clear_clean_mark {
            changes.push("no clean-shutdown mark any more".into());
        }
        if self.pairs_anew {
            let paired = self.pages.first().filter(|page| page.backing_sectors > 0);
            let with = match paired {
                None => "for any backing device".into(),
                Some(page) => {
                    format!("paired with a backing device of {} sectors", page.backing_sectors)
                }
            };
            changes.push(format!(
                "a new superblock extension, with a new UUID that fits the segments, {with}"
            ));
        }
        if let Some(bad) = self.bad_copy {
            changes.push(format!("the {bad} copy of the superblock extension, from the sound one"));
        }
        changes
    }

    /// What the plan writes to slots, one item for each kind of change.
    fn slot_changes(&self) -> Vec<String> {
        let (mut emptied, mut erased, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        for change in self.slot_plan.all_changes() {
            let partly = self.given_up.iter().any(|lost| lost.slot == change.slot && lost.kept > 0);
            match change.id {
                SegmentId::NONE => erased.push(change.slot.to_string()),
                id if partly => kept.push(id),
                id => emptied.push(id),
            }
        }
        kept.sort_unstable();
        emptied.sort_unstable();
        let mut changes = Vec::new();
        if !kept.is_empty() {
            changes.push(format!("only the good blocks of {}", segments(&kept)));
        }
        if !emptied.is_empty() {
            changes.push(format!("empty segments in the places of {}", segments(&emptied)));
        }
        if !self.misleading.is_empty() {
            changes.push(format!(
                "empty segments in the places of {}, from which the kernel module may take old \
                 data for new",
                segments(&self.misleading)
            ));
        }
        if !erased.is_empty() {
            let (slots, list) = (noun(erased.len(), "slot"), shortened(&erased));
            changes.push(format!("zeros over {slots} {list}"));
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

/// The ways to salvage a corrupt log and what each gives up, one line each. `option` is the
/// program's option for the mode.
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
            format!(". It rejects the superblock record ({record}): the whole log counts as dirty")
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

/// The advice before [`salvage_options`], as an imperative without a full stop.
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
