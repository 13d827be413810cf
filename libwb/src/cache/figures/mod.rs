//! What a cache counts and tells about itself.

pub(crate) mod accesses;
pub(crate) mod counters;
pub(crate) mod latency;
pub(crate) mod statistics;
pub(crate) mod status;
