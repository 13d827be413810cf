//! The rules that keep data safe. The simulator's tests break each rule once, to prove that they
//! would notice.
//!
//! Where a rule decides something, the code asks `Rules::keep`. Without the feature `sim` the
//! answer is always yes, and the compiler leaves nothing of the question.

#![cfg_attr(
    not(feature = "sim"),
    allow(unreachable_pub, reason = "exported with the feature alone")
)]
#![cfg_attr(
    not(all(feature = "engine", feature = "nbd-client")),
    allow(dead_code, reason = "each of the two has its own rules")
)]

/// A rule that a test can break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A flush is acknowledged only after the cache device was flushed.
    FlushWaitsForDevice,
    /// The superblock record is durable before the slots that it frees are reused.
    RecordMadeDurable,
    /// The backing device is flushed before the record says that segments are written back.
    BackingFlushedBeforeRecord,
    /// Recovery applies nothing above a gap.
    RecoveryStopsAtGap,
    /// A write to part of a block carries on the dirty sectors of the version before it.
    MergeKeepsOldSectors,
    /// No slot is overwritten while its old content is read.
    PinsRespected,
    /// Only durable segments are written back.
    OnlyDurableWrittenBack,
    /// Write-back leaves out an older version only if a newer one is in the same batch.
    OlderWrittenUnlessNewerInBatch,
    /// A newer version beyond the batch does not stand for an older one, even if it is durable.
    OlderWrittenThoughNewerDurable,
    /// Segments that recovery dropped are erased.
    DroppedErased,
    /// The appender runs ahead of the last flush by no more than the loss window.
    LossWindowKept,
    /// The header of a segment is written anew only when its last commit is durable.
    CommitReplacedOnlyWhenDurable,
    /// A block that belongs to a commit is not overwritten in place.
    CommittedNeverOverwritten,
    /// A flush of the device makes durable what was written when it began, and no more.
    DurableAsOfFlushStart,
    /// A segment that ends with a commit is closed before the log goes on.
    OpenEndClosed,
    /// Recovery applies nothing above a segment that is cut short.
    RecoveryStopsAtCutShort,
    /// Recovery reads a segment whole unless a header says that it was durable.
    UnclaimedReadWhole,
    /// Recovery reads on after the end of the log, as far as a power cut may have left segments.
    TailReadOn,
    /// Recovery links segments while it still reads others. If a slot was not what it seemed, it
    /// undoes that.
    LinkedAsReadLast,
    /// A slot that is looked at late and contradicts the log that is served fails the volume.
    ContradictionFails,
    /// A segment counts as written only when all segments before it do.
    WrittenWithoutGap,
    /// A failed flush of the cache device is final.
    FailedFlushFinal,
    /// A commit is durable by itself only if everything before it is durable.
    DurableWithoutGap,
    /// A failed durable write to the cache device is final.
    FailedDurableWriteFinal,
    /// The cache device is not flushed during a durable write.
    DurableWriteAlone,
    /// Data from the cache device is served only if its CRC is right.
    ReadsVerified,
    /// A header claims durability only for segments that are durable.
    OnlyDurableClaimed,
    /// The backing device is flushed before a discard is acknowledged.
    DiscardFlushed,
    /// A discard writes zeros over dirty data in the log.
    DiscardCoversDirty,
    /// A place no longer counts as the zeros of a discard once its slot is used again.
    DiscardMarkEndsWithSlot,
    /// Earlier writes are durable before a discard takes effect.
    DiscardAfterLogFlush,
    /// A segment that is to be emptied is emptied even if it cannot be read.
    UnreadableEmptied,
    /// A segment counts as emptied only when a write of that and a flush succeeded.
    EmptiedOnlyWhenFlushed,
    /// In strict order, a batch takes one epoch.
    OneEpochPerBatch,
    /// Writes wait for a range lock.
    RangeLocksRespected,
    /// A write goes through the log if the log holds an older version of its block.
    LoggedStaysInLog,
    /// The backing device is flushed before a write around the log is acknowledged.
    WriteAroundFlushed,
    /// Earlier writes are durable before a write goes around the log.
    WriteAroundAfterLogFlush,
    /// A write around the log drops the older version that is cached.
    WriteAroundDropsCached,
    /// A write around the log cancels the admission of its block.
    WriteAroundCancelsAdmission,
    /// A write cancels the admission of its block, so that nothing older is admitted.
    WriteCancelsAdmission,
    /// A read reserves the admission of a block in the same visit that finds it missing.
    ReservedInSameVisit,
    /// Of versions of a block in one batch, the newer one is written.
    VersionsStayInOrder,
    /// A discard cancels the admission of its blocks.
    DiscardCancelsAdmission,
    /// A block that could not be written back counts as moved only when its copy is durable.
    MovedMadeDurable,
    /// A block that could not be written back is moved before its segment is given up.
    StuckMoved,
    /// A lost block is moved with a CRC that its data does not match.
    LostMarked,
    /// A block belongs to the log's head only once its data is there.
    HeadDataFirst,
    /// An overwrite of a block in the log's head that was not completed is undone.
    HeadOverwriteUndone,
    /// A segment leaves the log's head only once it is on the cache device.
    HeadKeptUntilWritten,
    /// A process goes on with the head that the one before it has left.
    HeadResumed,
    /// What a process has taken over stays in the head until it is on the cache device.
    HeadKeptWhenResumed,
    /// A process knows which blocks of the segment that it takes over belong to a commit.
    HeadKnowsCommit,
    /// A segment that goes on in the head is not closed on the device.
    HeadEndStaysOpen,
    /// A lost block stays lost in the head.
    HeadKeepsLost,
    /// A process goes on as failed where the one before it had failed.
    HeadKeepsFailure,
    /// What an earlier process has written is durable before a process relies on that.
    FlushedAtOpen,
    /// While the link to the backing device is down, write-back waits and does not fail.
    LostLinkNoFault,
    /// After a reconnect, what an NBD server may have lost is written again before anything else.
    LinkWritesAgain,
    /// A flush of an NBD server covers what was acknowledged when it was sent, and no more.
    LinkFlushAsOfSending,
    /// A flush that was under way on a lost connection is sent again.
    LinkFlushSentAgain,
    /// What a durable write has replaced on an NBD server is not written again.
    LinkNewestRemembered,
    /// A write waits while an older one from a lost connection may come late.
    LinkLateWritesAwaited,
    /// A process that goes on with an export waits until no write of the dead one can come.
    LinkWaitsForTheDead,
    /// A process that goes on with an export makes durable what it can read there.
    LinkFlushesForTheDead,
    /// Recovery does not take rot for the work of a power cut. The engine never asks; the check of
    /// flipped bits does.
    #[cfg(feature = "sim")]
    RotIsNoPowerCut,
}

/// The rules that an open cache keeps: all of them, unless a test breaks one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    #[cfg(feature = "sim")]
    broken: Option<Rule>,
}

impl Rules {
    /// All rules but one.
    #[cfg(feature = "sim")]
    pub fn breaking(rule: Rule) -> Rules {
        Rules { broken: Some(rule) }
    }

    /// Whether this rule is kept.
    pub(crate) fn keep(self, rule: Rule) -> bool {
        #[cfg(feature = "sim")]
        return self.broken != Some(rule);
        #[cfg(not(feature = "sim"))]
        {
            let _ = rule;
            true
        }
    }
}
