//! Other processes, as the system shows them.

/// The ids of the processes that a process has started.
pub(crate) fn children_of(process: u32) -> Vec<String> {
    let told = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
    told.unwrap_or_default().split_whitespace().map(String::from).collect()
}

/// Whether a process has not ended.
pub(crate) fn is_alive(process: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with(['Z', 'X']))
}
