//! What one sector may show, and which of its versions a read or a recovery may show.

use crate::sim::stamp::{Content, WriteId};

/// A moment, as a count of events.
pub type Moment = u64;

pub(super) const NEVER: Moment = Moment::MAX;

/// A write as one of its sectors knows it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Version {
    pub(super) write: WriteId,
    pub(super) submitted: Moment,
    pub(super) acknowledged: Moment,
    /// It is a discard, and the sector reads as zeros.
    pub(super) zeros: bool,
    /// It was durable when it was acknowledged.
    pub(super) durable: bool,
    /// When it is known to have taken effect: acknowledged, or shown by a read.
    pub(super) effective: Moment,
    /// Its write returned an error, and nothing is known for certain.
    pub(super) failed: bool,
    /// When it was known to be replaced, and by which write, where reads have shown that.
    pub(super) replaced: Option<(Moment, WriteId)>,
}

impl Version {
    /// Whether this one came before `other` for certain.
    pub(super) fn precedes(&self, other: &Version) -> bool {
        self.acknowledged < other.submitted
    }
}

/// Drops versions that nothing may show any more: one that took effect before `moment`, since when
/// every read and every recovery must show it or something newer, comes after them.
pub(super) fn forget(versions: &mut Vec<Version>, moment: Moment) {
    let certain = versions.iter().filter(|version| version.acknowledged < moment);
    if let Some(newest) = certain.max_by_key(|version| version.submitted).copied() {
        versions.retain(|version| !version.precedes(&newest));
    }
}

/// The versions that a sector may show: one, or all that are zeros.
pub(super) fn candidates(versions: &[Version], content: Content) -> Result<Vec<Version>, String> {
    let matches = |version: &&Version| match content {
        Content::Of(write) => version.write == write && !version.zeros,
        Content::Zeros => version.zeros,
    };
    let found: Vec<Version> = versions.iter().filter(matches).copied().collect();
    if !found.is_empty() {
        return Ok(found);
    }
    Err(match content {
        Content::Of(write) => format!(
            "shows {write}, which has been replaced for good, was lost in a crash, or was never \
             made here"
        ),
        Content::Zeros => "holds zeros, though nothing that could show has discarded it".into(),
    })
}

/// Whether a read that began at `began` may show a version.
pub(super) fn may_be_read(
    versions: &[Version],
    shown: &Version,
    began: Moment,
) -> Result<(), String> {
    let write = shown.write;
    if let Some((moment, by)) = shown.replaced.filter(|(moment, _)| *moment < began) {
        return Err(format!(
            "shows {write}, which {by} had replaced by {moment}, as a read has shown"
        ));
    }
    let newer = versions.iter().find(|v| v.effective < began && shown.effective < v.submitted);
    newer.map_or(Ok(()), |newer| Err(format!("shows {write}, which is older than {}", newer.write)))
}

/// Whether a version may be what is recovered of the state at a moment.
pub(super) fn may_be_recovered(
    versions: &[Version],
    shown: &Version,
    moment: Moment,
    reason: &str,
) -> Result<(), String> {
    let write = shown.write;
    let kept = |v: &&Version| v.acknowledged < moment || v.durable;
    if let Some(lost) = versions.iter().find(|v| kept(v) && shown.precedes(v)) {
        let why = if lost.durable { "that one was durable" } else { reason };
        return Err(format!("shows {write} and lacks {}, though {why}", lost.write));
    }
    let replaced = shown.replaced.and_then(|(_, by)| versions.iter().find(|v| v.write == by));
    if replaced.is_some_and(|by| by.acknowledged < moment) {
        let by = shown.replaced.map_or(WriteId(0), |(_, by)| by);
        return Err(format!(
            "shows {write}, which reads had shown replaced by {by}, though {reason}"
        ));
    }
    Ok(())
}
