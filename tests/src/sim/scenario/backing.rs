//! The backing device of a scenario: at hand, or on a server.

use crate::sim::network::{flags, trouble};
use fastrand::Rng;
use libwb::device::Device;
use libwb::device::nbd::{LinkError, NbdDevice, Options};
use libwb::device::sim::network::SimServer;
use libwb::device::sim::{Crash, SimDevice, SimRuntime};
use libwb::nbd::{ExportName, TransmissionFlags};
use libwb::rules::Rules;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// How much later than others the server may carry out a request.
const LATENESS: Duration = Duration::from_secs(4);
/// How often something may happen to the server in the life of a process.
const MOST_TROUBLE: u32 = 12;

pub(super) struct Backing {
    runtime: SimRuntime,
    place: Place,
}

enum Place {
    Here(Arc<SimDevice>),
    Server(Served),
}

struct Served {
    server: SimServer,
    flags: TransmissionFlags,
    options: Options,
    rng: Rng,
}

impl Backing {
    pub(super) fn here(runtime: &SimRuntime, device: SimDevice) -> Backing {
        Backing { runtime: runtime.clone(), place: Place::Here(Arc::new(device)) }
    }

    /// On a server. `rules` are those of the device that is a client of it.
    pub(super) fn on_server(
        runtime: &SimRuntime,
        device: SimDevice,
        rules: Rules,
        seed: u64,
    ) -> Backing {
        let mut rng = Rng::with_seed(seed.rotate_left(48));
        let flags = flags(seed);
        // At times, so little that it comes to the limit.
        let most = rng.choice([16 << 10, 1 << 20, 64 << 20]).unwrap_or(64 << 20);
        let options = Options::new(ExportName::default()).writable(true);
        let options = options.rules(rules).remembering(most);
        let server = SimServer::new(runtime, device, flags);
        server.set_lateness(LATENESS);
        let place = Place::Server(Served { server, flags, options, rng });
        Backing { runtime: runtime.clone(), place }
    }

    /// The disk that holds the data.
    pub(super) fn disk(&self) -> Arc<SimDevice> {
        match &self.place {
            Place::Here(device) => device.clone(),
            Place::Server(served) => served.server.device(),
        }
    }

    /// The device as the next process uses it. On a server, things begin to happen.
    pub(super) fn open(&mut self) -> impl Future<Output = Result<Device, String>> + use<> {
        let runtime = self.runtime.clone();
        let device = match &mut self.place {
            Place::Here(device) => Ok(device.clone()),
            Place::Server(served) => {
                served.cause_trouble(&runtime);
                Err((served.server.clone(), served.options.clone()))
            }
        };
        async move {
            match device {
                Ok(device) => Ok(device as Device),
                Err((server, options)) => connect(runtime, server, options).await,
            }
        }
    }

    /// A process ends. A server may live on and lose its connections alone, or die as well.
    pub(super) fn crash(&mut self, crash: Crash) {
        match &mut self.place {
            Place::Here(device) => *device = Arc::new(device.crash(crash)),
            Place::Server(served) => {
                let crash = served.rng.choice([crash, Crash::Kill, Crash::PowerCut]);
                let device = served.server.device().crash(crash.unwrap_or(Crash::Kill));
                served.server = SimServer::new(&self.runtime, device, served.flags);
                served.server.set_lateness(LATENESS);
            }
        }
    }
}

impl Served {
    fn cause_trouble(&mut self, runtime: &SimRuntime) {
        let (server, runtime_of_task) = (self.server.clone(), runtime.clone());
        let (times, mut rng) = (self.rng.u32(..MOST_TROUBLE), self.rng.fork());
        let task = async move {
            for _ in 0..times {
                trouble(&server, &runtime_of_task, &mut rng).await;
            }
        };
        libwb::runtime::Runtime::spawn(runtime, Box::pin(task));
    }
}

/// Connects as soon as the server lets it.
async fn connect(
    runtime: SimRuntime,
    server: SimServer,
    options: Options,
) -> Result<Device, String> {
    loop {
        let (connector, runtime) = (Arc::new(server.clone()), Arc::new(runtime.clone()));
        match NbdDevice::open(runtime, connector, "backing", options.clone()).await {
            Ok(device) => return Ok(Arc::new(device)),
            // The server is dead or hangs, the connection breaks, or the simulator's time passes.
            Err(LinkError::Io(_) | LinkError::Timeout) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}
