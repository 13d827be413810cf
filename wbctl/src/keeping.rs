//! What the keeper of a volume and its server tell each other: over a socket that the server has as
//! its standard input. Each message is a JSON object. A descriptor may come with it.
//!
//! The keeper knows nothing of what it keeps but the names. It keeps the loop device apart: see
//! [`Reserved`].

use anyhow::{Context, Result, bail};
use libwb::serve::loopdev::Reserved;
use rustix::net::sockopt::socket_type;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

/// The version of these messages, of what a server leaves to the next one, and of the log's head. A
/// program of another version refuses to take over.
pub(crate) const VERSION: u32 = 1;
/// Tells a program what it was started as.
pub(crate) const VARIABLE: &str = "WB_KEEPING";

/// Exit code of a server that does not understand its keeper, or what an earlier one has left.
pub(crate) const REFUSED: i32 = 71;
/// Exit code of a server that made room for a newer program.
pub(crate) const REPLACED: i32 = 72;

/// The names of what is kept.
pub(crate) const LOOP: &str = "loop";
pub(crate) const FUSE: &str = "fuse";
pub(crate) const MOUNT: &str = "mount";
pub(crate) const GUARD: &str = "guard";
/// The socket that NBD clients connect to.
pub(crate) const NBD: &str = "nbd-listener";
pub(crate) const HEAD: &str = "head";
pub(crate) const LISTENER: &str = "listener";
/// The connection of a client that waits for a restart.
pub(crate) const CLIENT: &str = "client";
/// What is for keepers alone: the volume's lock, and the program before the last restart.
pub(crate) const LOCK: &str = "lock";
pub(crate) const BEFORE: &str = "before";

/// The longest message in bytes.
const MAX_MESSAGE: usize = 64 << 10;
/// How many descriptors are kept at most. There are fewer.
const MAX_KEPT: usize = 16;

/// How many signals a server is told of at its start. It ends sooner.
const MAX_SIGNALS: usize = 16;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "kebab-case")]
pub(crate) enum Message {
    /// From a server: it understands its keeper.
    Hello,
    /// A descriptor comes along. A server gets an answer once it is kept.
    Keep { name: String },
    /// From a server: that is not needed any more. It gets an answer.
    Forget { name: String },
    /// What the next server must know. The keeper cannot read it.
    State { text: String },
    /// The volume is served, and outlives its server or not.
    Ready { outlives: bool },
    /// From a server: for systemd, see sd_notify(3).
    Notify { text: String },
    /// From a server that panics: why.
    LastWords { text: String },
    /// From a server: it ends the volume. The keeper lets go of what users see, and answers.
    Ending,
    /// From a keeper: nothing else is kept. This program is installed, and the server is it or
    /// another one.
    Begin { program: PathBuf, is_installed: bool },
    /// From a keeper: it got this signal.
    Signal { number: i32 },
    /// From a keeper: it has done what it was told.
    Done,
    /// From a keeper: it cannot do that.
    Refused { why: String },
}

/// What this program was started as.
pub(crate) enum Role {
    /// By a user: it will be a keeper.
    First,
    /// The keeper that goes on for an earlier program, in the same process.
    Keeper(Link),
    /// A server.
    Server(Link),
    /// A server or a keeper of another version.
    Unknown,
}

impl Role {
    /// Looks at the environment.
    pub(crate) fn of_this() -> Result<Role> {
        let Some(told) = std::env::var_os(VARIABLE) else { return Ok(Role::First) };
        let link = || {
            Link::of_stdin()
                .with_context(|| format!("{VARIABLE} is set, but no keeper is at standard input"))
        };
        match told.to_str().and_then(|told| told.split_once(' ')) {
            Some((role, version)) if version == VERSION.to_string() => match role {
                "keeper" => Ok(Role::Keeper(link()?)),
                "server" => Ok(Role::Server(link()?)),
                _ => Ok(Role::Unknown),
            },
            _ => Ok(Role::Unknown),
        }
    }

    /// The value of [`VARIABLE`] for a server or a keeper.
    pub(crate) fn variable(role: &str) -> String {
        format!("{role} {VERSION}")
    }
}

/// One end of the socket. Sending never waits.
#[derive(Debug)]
pub(crate) struct Link(OwnedFd);

impl Link {
    /// Both ends.
    pub(crate) fn pair() -> io::Result<(Link, Link)> {
        let (one, other) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Link(one), Link(other)))
    }

    fn of_stdin() -> io::Result<Link> {
        let stdin = io::stdin().as_fd().try_clone_to_owned()?;
        if socket_type(&stdin)? != SocketType::SEQPACKET {
            return Err(ErrorKind::InvalidInput.into());
        }
        Ok(Link(stdin))
    }

    pub(crate) fn into_descriptor(self) -> OwnedFd {
        self.0
    }

    pub(crate) fn send(&self, message: &Message, with: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        if text.len() > MAX_MESSAGE {
            return Err(io::Error::new(ErrorKind::InvalidInput, "a message is too long"));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let with: Vec<BorrowedFd<'_>> = with.into_iter().collect();
        if !with.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&with));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        sendmsg(&self.0, &[IoSlice::new(&text)], &mut control, flags)?;
        Ok(())
    }

    /// Waits for a message, and for the descriptor that came along; `None` if the other end is
    /// closed. A message that cannot be understood is an error of the kind `InvalidData`.
    pub(crate) fn receive(&self) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
        self.receive_by(RecvFlags::empty())
    }

    /// The same, without waiting: then the error is `WouldBlock`.
    pub(crate) fn receive_now(&self) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
        self.receive_by(RecvFlags::DONTWAIT)
    }

    fn receive_by(&self, how: RecvFlags) -> io::Result<Option<(Message, Option<OwnedFd>)>> {
        let mut text = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let how = how | RecvFlags::CMSG_CLOEXEC;
        let got = loop {
            match recvmsg(&self.0, &mut [IoSliceMut::new(&mut text)], &mut control, how) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                got => break got?,
            }
        };
        if got.bytes == 0 {
            return Ok(None);
        }
        let came = control.drain().find_map(|it| match it {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        if got.flags.contains(ReturnFlags::TRUNC) {
            return Err(io::Error::new(ErrorKind::InvalidData, "a message is too long"));
        }
        let message = serde_json::from_slice(&text[..got.bytes])
            .map_err(|e| io::Error::new(ErrorKind::InvalidData, e))?;
        Ok(Some((message, came)))
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What outlives a server.
pub(crate) struct Kept {
    others: BTreeMap<String, OwnedFd>,
    has_loop: bool,
    /// Closed after the others: who closes the loop device last waits for the FUSE connection.
    reserved: Reserved,
}

impl Kept {
    pub(crate) fn in_place(reserved: Reserved) -> Kept {
        Kept { reserved, has_loop: false, others: BTreeMap::new() }
    }

    /// Keeps a descriptor, instead of what had the name before.
    pub(crate) fn put(&mut self, name: &str, descriptor: OwnedFd) -> io::Result<()> {
        if name == LOOP {
            self.reserved.hold(&descriptor)?;
            self.has_loop = true;
            return Ok(());
        }
        if self.others.len() >= MAX_KEPT && !self.others.contains_key(name) {
            return Err(io::Error::other("too much to keep"));
        }
        self.others.insert(name.into(), descriptor);
        Ok(())
    }

    pub(crate) fn get(&self, name: &str) -> Option<BorrowedFd<'_>> {
        self.others.get(name).map(AsFd::as_fd)
    }

    pub(crate) fn take(&mut self, name: &str) -> Option<OwnedFd> {
        self.others.remove(name)
    }

    /// The place of the loop device, whether or not it is there.
    pub(crate) fn into_reserved(self) -> Reserved {
        self.reserved
    }

    /// Lets go of what users of the volume see. The FUSE connection comes first: who closes the
    /// loop device last waits for it. The guard stays, until this process ends.
    pub(crate) fn let_go(&mut self) -> io::Result<()> {
        for name in [FUSE, MOUNT, NBD] {
            drop(self.others.remove(name));
        }
        self.has_loop = false;
        self.reserved.hold(File::open("/dev/null")?)
    }

    /// Sends all that `is_for_it`. The loop device comes first: it gets the lowest number there. If
    /// nobody takes the messages, the kernel closes what they hold from the last one to the first.
    pub(crate) fn send(&self, link: &Link, is_for_it: impl Fn(&str) -> bool) -> io::Result<()> {
        let keep = |name: &str| Message::Keep { name: name.into() };
        if self.has_loop {
            link.send(&keep(LOOP), Some(self.reserved.as_fd()))?;
        }
        for (name, descriptor) in self.others.iter().filter(|(name, _)| is_for_it(name)) {
            link.send(&keep(name), Some(descriptor.as_fd()))?;
        }
        Ok(())
    }
}

/// All that a keeper leaves to a server, or to itself.
pub(crate) struct Given {
    pub(crate) kept: Kept,
    /// What a server has said of itself; none if there was none.
    pub(crate) state: Option<String>,
    pub(crate) outlives: Option<bool>,
    pub(crate) signals: Vec<i32>,
    pub(crate) program: PathBuf,
    /// Whether this process was started as that program.
    pub(crate) is_installed: bool,
}

impl Given {
    /// Takes it all.
    pub(crate) fn take(link: &Link, reserved: Reserved) -> Result<Given> {
        let (mut kept, mut state) = (Kept::in_place(reserved), None);
        let (mut outlives, mut signals) = (None, Vec::new());
        loop {
            let Some((message, came)) = link.receive().context("cannot hear the keeper")? else {
                bail!("the keeper is gone")
            };
            match (message, came) {
                (Message::Keep { name }, Some(descriptor)) => kept.put(&name, descriptor)?,
                (Message::State { text }, _) => state = Some(text),
                (Message::Ready { outlives: it }, _) => outlives = Some(it),
                (Message::Signal { number }, _) if signals.len() < MAX_SIGNALS => {
                    signals.push(number)
                }
                (Message::Begin { program, is_installed }, _) => {
                    return Ok(Given { kept, state, outlives, signals, program, is_installed });
                }
                (other, _) => bail!("the keeper says {other:?}, which makes no sense now"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsRawFd;
    use std::process::Command;

    #[test]
    fn messages_arrive_as_they_were_sent_with_their_descriptors() {
        let (one, other) = Link::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let keep = Message::Keep { name: HEAD.into() };
        one.send(&keep, Some(file.as_fd())).unwrap();
        one.send(&Message::Done, None).unwrap();
        let (message, came) = other.receive().unwrap().unwrap();
        assert_eq!((message, came.is_some()), (keep, true));
        let (message, came) = other.receive().unwrap().unwrap();
        assert_eq!((message, came.is_some()), (Message::Done, false));
        assert_eq!(other.receive_now().unwrap_err().kind(), ErrorKind::WouldBlock);
        drop(one);
        assert!(other.receive().unwrap().is_none());
    }

    /// Runs a test of this module in a process of its own, where no other one closes descriptors.
    /// Returns whether this is that process.
    fn is_alone(test: &str) -> bool {
        const ALONE: &str = "WB_TEST_ALONE";
        if std::env::var_os(ALONE).is_some() {
            return true;
        }
        let mut alone = Command::new(std::env::current_exe().unwrap());
        alone.args(["--exact", &format!("keeping::tests::{test}")]).env(ALONE, "");
        let output = alone.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        false
    }

    #[test]
    fn the_loop_device_stays_below_the_connection_when_it_is_passed_on() {
        if !is_alone("the_loop_device_stays_below_the_connection_when_it_is_passed_on") {
            return;
        }
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let mut kept = Kept::in_place(Reserved::take().unwrap());
        kept.put(FUSE, null()).unwrap();
        kept.put(LOOP, null()).unwrap();
        kept.put(LOCK, null()).unwrap();
        let reserved = Reserved::take().unwrap();
        let (one, other) = Link::pair().unwrap();
        kept.send(&one, |name| name != LOCK).unwrap();
        let begin = Message::Begin { program: "/bin/true".into(), is_installed: true };
        one.send(&begin, None).unwrap();
        let given = Given::take(&other, reserved).unwrap();
        assert!(given.kept.has_loop && given.kept.get(LOCK).is_none());
        let fuse = given.kept.get(FUSE).unwrap().as_raw_fd();
        assert!(given.kept.reserved.as_fd().as_raw_fd() < fuse);
    }

    #[test]
    fn no_more_is_kept_than_there_can_be() {
        let mut kept = Kept::in_place(Reserved::take().unwrap());
        let mut put = |name: &str| kept.put(name, File::open("/dev/null").unwrap().into());
        (0..MAX_KEPT).for_each(|n| put(&n.to_string()).unwrap());
        assert!(put("one more").is_err() && put("0").is_ok() && put(LOOP).is_ok());
    }

    proptest! {
        #[test]
        fn garbage_is_no_message_and_does_no_harm(
            bytes in prop::collection::vec(any::<u8>(), 1..99),
        ) {
            let (one, other) = Link::pair().unwrap();
            let known = serde_json::from_slice::<Message>(&bytes).is_ok();
            rustix::net::send(&one, &bytes, SendFlags::empty()).unwrap();
            match other.receive() {
                Ok(message) => prop_assert!(message.is_some() && known),
                Err(e) => prop_assert!(e.kind() == ErrorKind::InvalidData && !known),
            }
        }
    }
}
