//! Serves a cached volume as a loop device until Enter is pressed: `serve CACHE BACKING`, as root.
//! `wbformat` makes the cache device.

use libwb::cache::{Cache, OpenOptions};
use libwb::device::probe::{Access, open_pair};
use libwb::device::{Device, UringDevice};
use libwb::reactor::Reactor;
use libwb::serve::Options;
use libwb::serve::loopdev::{LoopDevice, Reserved};
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn Error>> {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [cache, backing] = &paths[..] else { return Err("usage: serve CACHE BACKING".into()) };
    // Before anything else is opened: if this process is killed, the kernel closes its descriptors
    // in an order that depends on this one.
    let reserved = Reserved::take()?;
    let (cache, backing) = open_pair(cache, backing, [Access::Write; 2])?;
    let reactor = Reactor::start()?;
    let runtime = reactor.handle().clone();
    let options = Options { sector_size: 512, read_only: false, backing: backing.traits };
    let [cache, backing] =
        [cache, backing].map(|it| Arc::new(UringDevice::new(&runtime, it)) as Device);
    let opening = Cache::open(cache, backing, Arc::new(runtime.clone()), OpenOptions::serve());
    let cache = reactor.block_on(opening)?;

    let lost = |why: &str| eprintln!("the kernel has ended the device: {why}");
    let volume = cache.clone();
    let device = LoopDevice::attach(volume, &runtime, "example", options, reserved, lost)?;
    println!("serving {}; press Enter to end", device.path().display());
    std::io::stdin().read_line(&mut String::new())?;

    device.detach()?;
    reactor.block_on(cache.close())?;
    Ok(())
}
