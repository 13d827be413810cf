use super::*;
use proptest::option::of;
use proptest::prelude::*;
use std::path::Path;

fn tcp(host: &str, port: u16) -> Address {
    Address::Tcp { host: host.into(), port }
}

fn error(text: &str) -> String {
    text.parse::<Uri>().expect_err("a mistake").to_string()
}

#[test]
fn the_addresses_of_the_document_are_understood() {
    let parts = |text: &str| {
        let uri: Uri = text.parse().unwrap();
        (uri.address, uri.export.as_str().to_string())
    };
    let host = || tcp("example.com", DEFAULT_PORT);
    let socket = || Address::Unix("sock".into());
    for (text, address, export) in [
        ("nbd://example.com/disk", host(), "disk"),
        ("nbd+unix:///disk?socket=sock", socket(), "disk"),
        ("nbd://example.com/", host(), ""),
        ("nbd://example.com", host(), ""),
        ("nbd://example.com//disk", host(), "/disk"),
        ("nbd://example.com/hello%20world", host(), "hello world"),
        ("nbd://example.com/a/../b", host(), "a/../b"),
        ("NBD://example.com:1/d", tcp("example.com", 1), "d"),
        ("nbd://[::1]:20000/d", tcp("::1", 20000), "d"),
        ("nbd://[fe80::1]", tcp("fe80::1", DEFAULT_PORT), ""),
        ("nbd://127.0.0.1:/d", tcp("127.0.0.1", DEFAULT_PORT), "d"),
        ("nbd+unix:///?socket=/a%20b+c%3D", Address::Unix("/a b+c=".into()), ""),
    ] {
        assert_eq!(parts(text), (address, export.to_string()), "{text}");
    }
}

#[test]
fn tls_is_on_with_nbds_and_has_parameters() {
    let plain: Uri = "nbds://host/d".parse().unwrap();
    assert_eq!(plain.tls, Some(Tls::default()));
    let all = concat!(
        "nbds+unix:///d?socket=/s&tls-certificates=/etc/pki/nbd&tls-hostname=storage",
        "&tls-verify-peer=0"
    );
    let uri: Uri = all.parse().unwrap();
    let tls = uri.tls.clone().unwrap();
    assert_eq!(tls.certificates.as_deref(), Some(Path::new("/etc/pki/nbd")));
    assert_eq!((tls.hostname.as_deref(), tls.verify_peer), (Some("storage"), false));
    assert_eq!(uri.to_string(), all);
    assert!("nbds://h/d?tls-type=x509&tls-verify-peer=1".parse::<Uri>().is_ok());
}

#[test]
fn a_mistake_is_named() {
    for (text, what) in [
        ("/dev/sda", "'/dev/sda' is no NBD address: it must begin with nbd://"),
        ("nbd:unix:/tmp/s", "is no NBD address"),
        ("nbdx://host/", "is no NBD address"),
        ("nbd:///d", "names no host: write nbd://HOST"),
        ("nbd+unix:///d", "names no socket: write nbd+unix:///EXPORT?socket=PATH"),
        ("nbd+unix://host/d?socket=/s", "a Unix socket names no host"),
        ("nbd+unix:///d?socket=", "the socket is 0 bytes long"),
        ("nbd+unix:///d?socket=%00a", "abstract"),
        ("nbd+unix:///d?sokcet=/s", "unknown parameter 'sokcet'"),
        ("nbd+unix:///d?socket=/s&socket=/t", "'socket' stands twice"),
        ("nbd://h/d?socket=/s", "'socket' needs an address that begins with nbd+unix:///"),
        ("nbd://h/d?tls-verify-peer=0", "'tls-verify-peer' needs an address that begins with nbds"),
        ("nbds://h/d?tls-verify-peer=no", "'tls-verify-peer' is 'no'; wb knows 0 and 1"),
        ("nbds://h/d?tls-type=psk", "'tls-type' is 'psk'; wb knows x509"),
        ("nbds://h/d?tls-hostname=", "'tls-hostname' is ''"),
        ("nbd://h:0/d", "'0' is no TCP port: it must be a number from 1 to 65535"),
        ("nbd://h:65536/d", "'65536' is no TCP port"),
        ("nbd://h:+1/d", "'+1' is no TCP port"),
        ("nbd://h:1a/d", "'1a' is no TCP port"),
        ("nbd://::1/d", "'::1' is no host name, IPv4 address, or IPv6 address in brackets"),
        ("nbd://[::1/d", "'[::1' is no host name"),
        ("nbd://[::g]/d", "'[::g]' is no host name"),
        ("nbd://[::1]x/d", "'[::1]x' is no host name"),
        ("nbd://a b/d", "'a b' is no host name"),
        ("nbd://me@h/d", "leave out 'me@'"),
        ("nbd://h/d#1", "write %23 for a '#'"),
        ("nbd://h/100%", "'%' must be followed by two hexadecimal digits in '100%'"),
        ("nbd://h/%g0", "'%' must be followed"),
        ("nbd://h/%00", "contains a zero byte"),
        ("nbd://h/%ff", "not valid UTF-8"),
    ] {
        assert!(error(text).contains(what), "{text}: {}", error(text));
    }
    let long = "x".repeat(108);
    assert!(error(&format!("nbd+unix:///?socket={long}")).contains("108 bytes long"));
}

fn address() -> impl Strategy<Value = Address> {
    let host = prop_oneof![
        "[a-zA-Z0-9._-]{1,20}",
        any::<Ipv6Addr>().prop_map(|address| address.to_string())
    ];
    prop_oneof![
        (host, 1u16..).prop_map(|(host, port)| Address::Tcp { host, port }),
        "[^\0]{1,25}".prop_map(|socket| Address::Unix(socket.into())),
    ]
}

fn tls() -> impl Strategy<Value = Tls> {
    (of("[^\0]{1,20}"), of("\\PC{1,20}"), any::<bool>()).prop_map(
        |(folder, hostname, verify_peer)| {
            let certificates = folder.map(PathBuf::from);
            Tls { certificates, hostname, verify_peer }
        },
    )
}

proptest! {
    #[test]
    fn what_is_shown_is_understood(
        address in address(),
        export in "[^\0]{0,40}",
        tls in of(tls()),
    ) {
        let uri = Uri { address, export: ExportName::new(export).unwrap(), tls };
        let shown = uri.to_string();
        prop_assert!(shown.is_ascii() && !shown.contains(' '), "{}", shown);
        prop_assert_eq!(shown.parse::<Uri>(), Ok(uri));
    }

    #[test]
    fn any_text_is_an_address_or_none(
        scheme in "(nbds?(\\+unix)?://)?",
        rest in "[a-z0-9:/?&=%@#\\[\\]\\PC-]{0,40}",
    ) {
        let _ = format!("{scheme}{rest}").parse::<Uri>();
        let _ = format!("{scheme}/{rest}?socket=a&tls-{rest}").parse::<Uri>();
    }
}

#[test]
fn an_address_of_this_host_is_told_from_others() {
    let is_local = |text: &str| text.parse::<Uri>().unwrap().address.is_local();
    for near in [
        "nbd://localhost",
        "nbd://LOCALHOST:1/x",
        "nbd://127.0.0.5",
        "nbd://[::1]/",
        "nbd://[::ffff:127.0.0.1]",
    ] {
        assert!(is_local(near), "{near}");
    }
    assert!(is_local("nbd+unix:///x?socket=/s"));
    for far in ["nbd://server", "nbd://192.0.2.1", "nbd://[2001:db8::1]", "nbd://localhost.example"]
    {
        assert!(!is_local(far), "{far}");
    }
}
