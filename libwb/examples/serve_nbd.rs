//! Serves a cached volume over NBD until Enter is pressed: `serve_nbd ADDRESS CACHE BACKING`. The
//! address is `nbd://IP[:PORT]/NAME` or `nbd+unix:///NAME?socket=PATH`; with TLS, it begins with
//! `nbds` and ends with `?tls-certificates=FOLDER`. `wbformat` makes the cache device. No rights
//! beyond those on the files are needed.

use libwb::cache::{Cache, OpenOptions};
use libwb::device::probe::{Access, open_pair};
use libwb::device::{Device, UringDevice};
use libwb::nbd::{self, Uri};
use libwb::reactor::{Address, Listener, Reactor};
use libwb::serve::Options;
use libwb::serve::nbd::{NbdServer, ServerTls, Session, listen};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, cache, backing] = &arguments[..] else {
        return Err("usage: serve_nbd ADDRESS CACHE BACKING".into());
    };
    let Uri { address, export, tls } = address.parse()?;
    let address = match address {
        nbd::Address::Tcp { host, port } => {
            Address::Tcp((host.parse::<std::net::IpAddr>()?, port).into())
        }
        nbd::Address::Unix(path) => Address::Unix(path),
    };
    let tls = match tls.map(|tls| tls.certificates) {
        None => None,
        Some(Some(folder)) => Some(ServerTls::load(&folder)?),
        Some(None) => return Err("TLS needs certificates: ?tls-certificates=FOLDER".into()),
    };

    let (cache, backing) = open_pair(Path::new(cache), Path::new(backing), [Access::Write; 2])?;
    let reactor = Reactor::start()?;
    let runtime = reactor.handle().clone();
    let options = Options { sector_size: 512, read_only: false, backing: backing.traits };
    let [cache, backing] =
        [cache, backing].map(|it| Arc::new(UringDevice::new(&runtime, it)) as Device);
    let opening = Cache::open(cache, backing, Arc::new(runtime.clone()), OpenOptions::serve());
    let cache = reactor.block_on(opening)?;

    let listener = Listener::new(&runtime, listen(&address)?)?;
    let session =
        Session::new(cache.clone(), export.as_str(), options, tls, Arc::new(runtime.clone()))?;
    let server = NbdServer::start(&runtime, listener, session);
    println!("serving {address}; press Enter to end");
    std::io::stdin().read_line(&mut String::new())?;

    reactor.block_on(server.stop());
    reactor.block_on(cache.close())?;
    Ok(())
}
