//! Writes a cache back to its backing device, without serving it: `replay CACHE BACKING`. Both are
//! block devices or plain files.

use libwb::cache::{Cache, OpenOptions};
use libwb::device::probe::{Access, open_pair};
use libwb::device::{Device, UringDevice};
use libwb::reactor::Reactor;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn Error>> {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [cache, backing] = &paths[..] else { return Err("usage: replay CACHE BACKING".into()) };
    // Opening locks both: no other program can use them meanwhile.
    let (cache, backing) = open_pair(cache, backing, [Access::Write; 2])?;
    let reactor = Reactor::start()?;
    let runtime = Arc::new(reactor.handle().clone());
    let [cache, backing] =
        [cache, backing].map(|it| Arc::new(UringDevice::new(reactor.handle(), it)) as Device);
    reactor.block_on(async {
        let cache = Cache::open(cache, backing, runtime, OpenOptions::replay()).await?;
        let dirty = cache.status().dirty_blocks;
        cache.drain().await?;
        cache.close().await?;
        println!("wrote {dirty} blocks back");
        Ok(())
    })
}
