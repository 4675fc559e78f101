//! Bugs that are planted on purpose, to show that the invariants find them. Each is a mistake that somebody could
//! really make, in the shell around a core or on the way to it; the cores stay as they are.

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// A frame counts as acknowledged as soon as it was sent.
    LostAckIgnored,
    /// After a streamer came back the gateway's end begins to number its frames anew.
    LinkNumberReused,
    /// The gateway asks an agent only once to end a session.
    EndNotRepeated,
    /// The gateway asks an agent only once to launch a session.
    AcceptNotRepeated,
    /// A unit whose lease has ended does not take a new one.
    LeaseNotRearmed,
    /// An agent says that it tells everything before it has read AMS's list.
    EndedOnLostObservation,
    /// AMS launches again when the answer to a launch was lost.
    AttemptNotFenced,
    /// A new AMS removes what it has not adopted yet.
    DeletedWithoutOwner,
    /// The share of an instance is not reserved with its record.
    PlacedTwice,
    /// A caller has its answer before the record is written.
    AcknowledgedBeforeWritten,
    /// The key of a create is not remembered.
    RepeatForgotten,
    /// A record is written without looking whether it changed meanwhile.
    WrittenWithoutCompare,
    /// An agent that took a session in spite of its silence is left alone.
    SecondClusterLeft,
    /// AMS starts a run before it has written that it does.
    StartedBeforeWritten,
    /// AMS gives a share back when the end is asked for, not when it came.
    ShareGivenBackEarly,
    /// What an agent was told to end while it was being launched is not removed when the launch is answered.
    LaunchForgotten,
    /// A unit ends what its memory says runs elsewhere, without asking the store.
    IndexBelieved,
    /// What an agent tells counts although the session went to another cluster meanwhile.
    MovedNotNoticed,
    /// A launch takes a waiting instance without looking whether it still waits.
    ClaimedWithoutCompare,
}

impl Planted {
    /// All of them.
    pub const ALL: [Self; 19] = [
        Self::LostAckIgnored,
        Self::LinkNumberReused,
        Self::EndNotRepeated,
        Self::AcceptNotRepeated,
        Self::LeaseNotRearmed,
        Self::EndedOnLostObservation,
        Self::AttemptNotFenced,
        Self::DeletedWithoutOwner,
        Self::PlacedTwice,
        Self::AcknowledgedBeforeWritten,
        Self::RepeatForgotten,
        Self::WrittenWithoutCompare,
        Self::SecondClusterLeft,
        Self::StartedBeforeWritten,
        Self::ShareGivenBackEarly,
        Self::LaunchForgotten,
        Self::IndexBelieved,
        Self::MovedNotNoticed,
        Self::ClaimedWithoutCompare,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::LostAckIgnored => "lost-ack-ignored",
            Self::LinkNumberReused => "link-number-reused",
            Self::EndNotRepeated => "end-not-repeated",
            Self::AcceptNotRepeated => "accept-not-repeated",
            Self::LeaseNotRearmed => "lease-not-rearmed",
            Self::EndedOnLostObservation => "ended-on-lost-observation",
            Self::AttemptNotFenced => "attempt-not-fenced",
            Self::DeletedWithoutOwner => "deleted-without-owner",
            Self::PlacedTwice => "placed-twice",
            Self::AcknowledgedBeforeWritten => "acknowledged-before-written",
            Self::RepeatForgotten => "repeat-forgotten",
            Self::WrittenWithoutCompare => "written-without-compare",
            Self::SecondClusterLeft => "second-cluster-left",
            Self::StartedBeforeWritten => "started-before-written",
            Self::ShareGivenBackEarly => "share-given-back-early",
            Self::LaunchForgotten => "launch-forgotten",
            Self::IndexBelieved => "index-believed",
            Self::MovedNotNoticed => "moved-not-noticed",
            Self::ClaimedWithoutCompare => "claimed-without-compare",
        }
    }

    /// The bug of a name.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|planted| planted.name() == name)
    }
}
