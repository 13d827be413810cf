//! The versions of a sector, and which of them a read or a recovery may show.

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
    /// Whether it is a discard, after which the sector reads as zeros.
    pub(super) zeros: bool,
    /// Whether it was durable once acknowledged.
    pub(super) durable: bool,
    /// When it certainly had taken effect: it was acknowledged, or a read showed it.
    pub(super) effective: Moment,
    /// Whether it came again after a death of the process, and was not acknowledged since. A read
    /// may show what an earlier process did of it, and it takes effect once more.
    pub(super) again: bool,
    /// Whether its write returned an error, so that nothing about it is certain.
    pub(super) failed: bool,
    /// When reads showed that another write had replaced it, and which.
    pub(super) replaced: Option<(Moment, WriteId)>,
}

impl Version {
    /// From when on it certainly takes effect no more.
    pub(super) fn settled(&self) -> Moment {
        if self.again { NEVER } else { self.effective }
    }

    /// Whether this version certainly came before `other`.
    pub(super) fn precedes(&self, other: &Version) -> bool {
        self.acknowledged < other.submitted
    }
}

/// Drops versions that nothing may show any more. Every read and recovery since `moment` must show
/// the newest write acknowledged before it, or something newer.
pub(super) fn forget(versions: &mut Vec<Version>, moment: Moment) {
    let certain = versions.iter().filter(|version| version.acknowledged < moment);
    if let Some(newest) = certain.max_by_key(|version| version.submitted).copied() {
        versions.retain(|version| !version.precedes(&newest));
    }
}

/// The versions that match what a sector shows: one, or every discard.
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
    let newer = versions.iter().find(|v| v.effective < began && shown.settled() < v.submitted);
    newer.map_or(Ok(()), |newer| Err(format!("shows {write}, which is older than {}", newer.write)))
}

/// Whether recovery of the state at a moment may show a version.
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
