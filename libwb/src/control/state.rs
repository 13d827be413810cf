//! The states of a volume.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The state of a volume. Its JSON is the state's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
#[non_exhaustive]
pub enum VolumeState {
    /// It is served.
    Attached,
    /// It is served for reads alone.
    AttachedReadOnly,
    /// It is served, but something is wrong with it.
    Degraded,
    /// It refuses writes.
    Failed,
    /// It is not served.
    Detached,
    /// Its daemon ended without closing it.
    Crashed,
    /// Its daemon recovers the log, or closes it.
    StartingOrStopping,
    /// Its daemon runs, but does not answer.
    NotAnswering,
    /// Its record cannot be read.
    UnreadableRecord,
    /// A state of a newer daemon, in that daemon's words.
    Other(String),
}

impl VolumeState {
    /// All states that this version knows.
    pub const KNOWN: [VolumeState; 9] = [
        VolumeState::Attached,
        VolumeState::AttachedReadOnly,
        VolumeState::Degraded,
        VolumeState::Failed,
        VolumeState::Detached,
        VolumeState::Crashed,
        VolumeState::StartingOrStopping,
        VolumeState::NotAnswering,
        VolumeState::UnreadableRecord,
    ];

    /// The state in a few words. The names are part of the JSON output.
    pub fn name(&self) -> &str {
        match self {
            VolumeState::Attached => "attached",
            VolumeState::AttachedReadOnly => "attached read-only",
            VolumeState::Degraded => "degraded",
            VolumeState::Failed => "failed",
            VolumeState::Detached => "detached",
            VolumeState::Crashed => "crashed",
            VolumeState::StartingOrStopping => "starting or stopping",
            VolumeState::NotAnswering => "not answering",
            VolumeState::UnreadableRecord => "unreadable record",
            VolumeState::Other(name) => name,
        }
    }
}

/// What a daemon that tells no state leaves: no words.
impl Default for VolumeState {
    fn default() -> VolumeState {
        VolumeState::Other(String::new())
    }
}

impl From<String> for VolumeState {
    fn from(name: String) -> VolumeState {
        let known = VolumeState::KNOWN.into_iter().find(|state| state.name() == name);
        known.unwrap_or(VolumeState::Other(name))
    }
}

impl From<VolumeState> for String {
    fn from(state: VolumeState) -> String {
        state.name().into()
    }
}

impl fmt::Display for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // With the padding that a table may ask for.
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_is_read_as_it_was_written_also_one_of_a_newer_daemon() {
        let other = VolumeState::Other("half asleep".into());
        for state in VolumeState::KNOWN.into_iter().chain([other, VolumeState::default()]) {
            let json = serde_json::to_value(&state).unwrap();
            assert_eq!(json, state.name());
            assert_eq!(serde_json::from_value::<VolumeState>(json).unwrap(), state);
        }
    }
}
