//! Keeps the link to a server: makes connections, and makes them anew when they are lost.

use super::connection::{halves, receive, send};
use super::connector::{BoxStream, Connector};
use super::handshake::{Agreed, LinkError, negotiate};
use super::shared::Shared;
use crate::nbd::{ExportName, TransmissionFlags};
use crate::runtime::Runtime;
use futures_lite::future::or;
use futures_util::future::{BoxFuture, Either, select, select_all, try_join_all};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

/// How many connections there are at most, if the server allows several.
const MOST_CONNECTIONS: usize = 4;
/// How long it may take to make the first connection, and each other one. A server may let more
/// wait than it serves.
const MOST_TIME: Duration = Duration::from_secs(15);
const MOST_TIME_FOR_MORE: Duration = Duration::from_secs(2);
/// How long the first new attempt waits. Each waits for twice as long as the one before, up to
/// [`LONGEST_PAUSE`].
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How exactly time limits are kept.
const TICK: Duration = Duration::from_millis(250);

/// How an export is reached.
pub(super) struct Route {
    pub(super) connector: Arc<dyn Connector>,
    pub(super) export: ExportName,
}

impl Route {
    async fn connect_one(
        &self,
        runtime: &dyn Runtime,
        within: Duration,
    ) -> Result<(BoxStream, Agreed), LinkError> {
        let connect = async {
            let stream = self.connector.connect().await?;
            negotiate(stream, &*self.connector, &self.export).await
        };
        match select(pin!(connect), runtime.sleep(within)).await {
            Either::Left((done, _)) => done,
            Either::Right(_) => Err(LinkError::Timeout),
        }
    }

    /// Makes as many connections as make sense.
    pub(super) async fn connect(
        &self,
        runtime: &dyn Runtime,
    ) -> Result<(Vec<BoxStream>, Agreed), LinkError> {
        let (first, agreed) = self.connect_one(runtime, MOST_TIME).await?;
        let mut streams = vec![first];
        let most = match agreed.flags.contains(TransmissionFlags::CAN_MULTI_CONN) {
            true => MOST_CONNECTIONS,
            false => 1,
        };
        while streams.len() < most {
            match self.connect_one(runtime, MOST_TIME_FOR_MORE).await {
                Ok((stream, again)) if again == agreed => streams.push(stream),
                // It takes no more of them. Fewer do as well.
                Ok(_) | Err(_) => break,
            }
        }
        Ok((streams, agreed))
    }
}

/// Fails whatever waits when the task that keeps the link ends, or is dropped with its runtime.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.state().stop();
    }
}

/// Serves the operations of a device over these connections, if there are any yet, and over those
/// that follow them.
pub(super) async fn keep(shared: Arc<Shared>, route: Route, connections: Option<Vec<BoxStream>>) {
    let _ending = Ending(shared.clone());
    or(keep_on(&shared, &route, connections), tick(&shared)).await;
}

async fn keep_on(shared: &Shared, route: &Route, connections: Option<Vec<BoxStream>>) {
    let mut pause = Duration::ZERO;
    let mut next = match connections {
        Some(connections) => Some(connections),
        None => unless_over(shared, reconnect(shared, route, &mut pause)).await,
    };
    while let Some(connections) = next {
        let since = shared.now();
        shared.state().connected(connections.len());
        shared.tell();
        let Err(why) = serve(shared, connections).await else { return };
        if shared.state().is_over() {
            return;
        }
        tracing::warn!("the link to the NBD export '{}' is lost: {why}", route.export);
        // A server that takes connections and ends them at once is not asked without a pause.
        if shared.now().saturating_sub(since) >= LONGEST_PAUSE {
            pause = SHORTEST_PAUSE;
        }
        pause = pause.max(SHORTEST_PAUSE);
        shared.state().lost(why, shared.now());
        shared.tell();
        next = unless_over(shared, reconnect(shared, route, &mut pause)).await;
        if next.is_some() {
            tracing::info!("the link to the NBD export '{}' is up again", route.export);
        }
    }
}

/// Does something as long as the link is needed.
async fn unless_over<T>(shared: &Shared, work: impl Future<Output = T>) -> Option<T> {
    or(async { Some(work.await) }, async {
        over(shared).await;
        None
    })
    .await
}

/// Serves until all is done and no more will come.
///
/// # Errors
/// Why the connections are over.
async fn serve(shared: &Shared, connections: Vec<BoxStream>) -> Result<(), String> {
    let (mut senders, mut receivers) = (Vec::new(), Vec::<BoxFuture<'_, String>>::new());
    for (on, stream) in connections.into_iter().enumerate() {
        let (incoming, outgoing) = halves(stream);
        senders.push(Box::pin(send(outgoing, shared, on)));
        receivers.push(Box::pin(receive(incoming, shared, on)));
    }
    receivers.push(Box::pin(given_up(shared)));
    match select(try_join_all(senders), select_all(receivers)).await {
        Either::Left((all_sent, _)) => all_sent.map(drop),
        Either::Right(((why, ..), _)) => Err(why),
    }
}

/// Waits until the connections count as lost.
async fn given_up(shared: &Shared) -> String {
    loop {
        let news = shared.news.listen();
        if let Some(why) = shared.state().take_verdict() {
            return why;
        }
        news.await;
    }
}

/// Waits until the link is no longer needed.
async fn over(shared: &Shared) {
    loop {
        let news = shared.news.listen();
        if shared.state().is_over() {
            return;
        }
        news.await;
    }
}

async fn reconnect(shared: &Shared, route: &Route, pause: &mut Duration) -> Vec<BoxStream> {
    let mut told = String::new();
    loop {
        if !pause.is_zero() {
            shared.runtime.sleep(*pause).await;
        }
        *pause = (*pause * 2).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
        let error = match route.connect(&*shared.runtime).await {
            Err(error) => error,
            Ok((streams, agreed)) => match shared.state().agree_again(agreed) {
                Ok(()) => return streams,
                Err(what) => LinkError::Changed(what),
            },
        };
        let why = error.to_string();
        if why != told {
            tracing::warn!("cannot connect to the NBD export '{}' again: {why}", route.export);
            told.clone_from(&why);
        }
        shared.state().failed(why, matches!(error, LinkError::Changed(_)));
    }
}

/// Keeps the time limits.
async fn tick(shared: &Shared) {
    loop {
        let news = shared.news.listen();
        if shared.state().is_quiet() {
            news.await;
            continue;
        }
        shared.runtime.sleep(TICK).await;
        if shared.state().pass(shared.now()) {
            shared.tell();
        }
    }
}
