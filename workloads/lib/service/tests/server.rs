//! The server over real sockets: TLS, client certificates, unix sockets, limits, and the end.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    sync::Arc,
    time::Duration,
};

use axum::{Extension, Router, routing::get};
use fanlight_service::{
    Shutdown,
    http::{Binding, Edge, GatewayStyle, Limits, Peer, bind_tcp, bind_unix, serve},
    tls::{KeyFiles, ensure_self_signed, install_provider, server_config},
};

fn edge() -> Arc<Edge> {
    let who = |Extension(peer): Extension<Peer>| async move {
        format!("{} {:?} {:?}", peer.tls, peer.fingerprint(), peer.credentials.map(|peer| peer.uid))
    };
    let slow = || async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        "done"
    };
    Edge::new(Router::new().route("/who", get(who)).route("/slow", get(slow)), Arc::new(GatewayStyle), 1024)
}

fn free() -> TcpListener {
    bind_tcp(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port")
}

fn names() -> Vec<String> {
    vec!["127.0.0.1".into(), "localhost".into()]
}

#[tokio::test]
async fn the_client_s_certificate_reaches_the_handler_and_none_is_fine_too() {
    install_provider();
    let folder = tempfile::tempdir().expect("folder");
    let server = KeyFiles::in_folder(folder.path(), "server");
    let client = KeyFiles::in_folder(folder.path(), "client");
    ensure_self_signed(&server, "server", &names()).expect("made");
    let fingerprint = ensure_self_signed(&client, "client", &[]).expect("made");
    let shutdown = Shutdown::new();
    let binding = Binding::Tls(free(), server_config(&server).expect("usable"));
    let address = serve(binding, edge(), Limits::default(), &shutdown).expect("serves").expect("TCP");
    let read = |path: &std::path::Path| std::fs::read(path).expect("file");
    let root = reqwest::Certificate::from_pem(&read(&server.certificate)).expect("PEM");
    let builder = || reqwest::Client::builder().tls_certs_only([root.clone()]);
    let ask = async |client: reqwest::Client| {
        let answer = client.get(format!("https://{address}/who")).send().await.expect("answer");
        answer.text().await.expect("text")
    };
    assert_eq!(ask(builder().build().expect("client")).await, "true None None");
    let pem = [read(&client.key), read(&client.certificate)].concat();
    let identity = reqwest::Identity::from_pem(&pem).expect("identity");
    let told = ask(builder().identity(identity).build().expect("client")).await;
    assert_eq!(told, format!("true Some({fingerprint:?}) None"));
    let old = builder().tls_version_max(reqwest::tls::Version::TLS_1_2).build().expect("client");
    assert!(old.get(format!("https://{address}/who")).send().await.is_err(), "TLS 1.2 is too old");
    shutdown.stop(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn a_unix_socket_is_private_replaced_when_dead_and_refused_when_in_use() {
    install_provider();
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("deep/er.sock");
    let first = bind_unix(&path, 0o600).expect("bound");
    assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
    let refused = bind_unix(&path, 0o600).expect_err("in use").to_string();
    assert!(refused.contains("er.sock") && refused.contains("another process"), "{refused}");
    drop(first);
    let shutdown = Shutdown::new();
    let listener = bind_unix(&path, 0o660).expect("the dead one is replaced");
    serve(Binding::Unix(listener), edge(), Limits::default(), &shutdown).expect("serves");
    let client = reqwest::Client::builder().unix_socket(path.as_path()).build().expect("client");
    let told = client.get("http://local/who").send().await.expect("answer").text().await.expect("text");
    let uid = rustix::process::getuid().as_raw();
    assert_eq!(told, format!("false None Some({uid})"));
    shutdown.stop(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn an_address_in_use_is_told_with_what_to_do() {
    let taken = free();
    let address = taken.local_addr().expect("address");
    let refused = bind_tcp(address).expect_err("in use").to_string();
    assert!(refused.contains(&address.to_string()) && refused.contains("another process"), "{refused}");
}

#[tokio::test]
async fn requests_under_way_are_finished_and_new_connections_are_not_taken() {
    install_provider();
    let shutdown = Shutdown::new();
    let binding = Binding::Tcp(free());
    let address = serve(binding, edge(), Limits::default(), &shutdown).expect("serves").expect("TCP");
    let client = reqwest::Client::builder().tls_certs_only([]).build().expect("client");
    let request = client.get(format!("http://{address}/slow"));
    let slow = tokio::spawn(async move { request.send().await.expect("answer").text().await.expect("text") });
    while client.get(format!("http://{address}/who")).send().await.is_err() {}
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(shutdown.stop(Duration::from_secs(10)).await);
    assert_eq!(slow.await.expect("finished"), "done");
    assert!(TcpStream::connect(address).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_sends_no_header_is_cut_and_frees_its_place() {
    let shutdown = Shutdown::new();
    let limits = Limits { connections: 1, header_time: Duration::from_millis(100), ..Limits::default() };
    let address = serve(Binding::Tcp(free()), edge(), limits, &shutdown).expect("serves").expect("TCP");
    let work = tokio::task::spawn_blocking(move || {
        let mut idle = TcpStream::connect(address).expect("connects");
        idle.write_all(b"GET /who HTT").expect("writes");
        // The only place is taken until the idle one is cut; then this one is served.
        let mut next = TcpStream::connect(address).expect("connects");
        next.write_all(b"GET /who HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("writes");
        let mut answer = String::new();
        next.read_to_string(&mut answer).expect("reads");
        answer
    });
    let answer = work.await.expect("done");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("false None None"), "{answer}");
    shutdown.stop(Duration::from_secs(10)).await;
}
