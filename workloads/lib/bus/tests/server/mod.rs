//! Real `nats-server`s on free ports of loopback, ended with their handles.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

/// A server that can be killed and started again at the same address.
pub struct Server {
    port: u16,
    arguments: Vec<String>,
    child: Option<Child>,
}

impl Server {
    /// A running server.
    pub fn start(arguments: &[&str]) -> Self {
        let mut server = Self::prepare(arguments);
        server.restart();
        server
    }

    /// A server that does not run yet.
    pub fn prepare(arguments: &[&str]) -> Self {
        let free = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = free.local_addr().expect("bound").port();
        let arguments = arguments.iter().map(|text| (*text).to_owned()).collect();
        Self { port, arguments, child: None }
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("killed");
            child.wait().expect("ended");
        }
    }

    /// Starts it and waits until it listens.
    pub fn restart(&mut self) {
        self.kill();
        // Debian keeps it where only administrators look.
        let program = ["/usr/sbin/nats-server", "/usr/bin/nats-server"];
        let program = program.into_iter().find(|path| Path::new(path).exists()).unwrap_or("nats-server");
        let child = Command::new(program)
            .args(["--addr", "127.0.0.1", "--port", &self.port.to_string()])
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| {
                panic!("{program} is needed for this test (Debian: nats-server): {error}")
            });
        self.child = Some(child);
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(start.elapsed() < Duration::from_secs(20), "nats-server does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Paths for the server's command line.
pub struct Certificates {
    pub ca: String,
    pub server_certificate: String,
    pub server_key: String,
}

/// Settings for the servers of a cluster in which clients and routes use TLS, and clients log in with `me` and
/// `hunter2`. The certificates are those that [`certificates`] makes in this folder.
pub fn cluster(folder: &Path, count: usize) -> Vec<Server> {
    // All at the same time, so that no port is given out twice.
    let free: Vec<TcpListener> =
        (0..count).map(|_| TcpListener::bind(("127.0.0.1", 0)).expect("a free port")).collect();
    let routes: Vec<String> = free.iter().map(|free| free.local_addr().expect("bound").to_string()).collect();
    let at = folder.display();
    let tls = format!(
        r#"tls {{ cert_file: "{at}/server.pem", key_file: "{at}/server.key", ca_file: "{at}/ca.pem", verify: true }}"#
    );
    let urls: Vec<String> = routes.iter().map(|route| format!("\"nats-route://{route}\"")).collect();
    let mut servers: Vec<Server> = Vec::new();
    for (n, route) in routes.iter().enumerate() {
        let settings = folder.join(format!("server-{n}.conf"));
        let text = format!(
            r#"
                server_name: "server-{n}"
                {tls}
                authorization {{ user: "me", password: "hunter2" }}
                cluster {{ name: "test", listen: "{route}", {tls}, routes: [{}] }}
            "#,
            urls.join(", "),
        );
        fs::write(&settings, text).expect("written");
        servers.push(Server::prepare(&["--config", settings.to_str().expect("text")]));
    }
    drop(free);
    for server in &mut servers {
        server.restart();
    }
    servers
}

/// Makes `ca.pem`, `server.pem`, `client.pem`, `guest.pem` and their keys; `other-ca.pem`, and `stranger.pem` with its
/// key, which comes from there. The subject of each is its name.
pub fn certificates(folder: &Path) -> Certificates {
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        fs::write(&path, text).expect("written");
        path.to_str().expect("text").to_owned()
    };
    let authority = || {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("signed");
        (Issuer::new(params, key), certificate.pem())
    };
    let (issuer, ca) = authority();
    let (other_issuer, other) = authority();
    write("other-ca.pem", other);
    let mut made = Vec::new();
    for (name, issuer) in
        [("server", &issuer), ("client", &issuer), ("guest", &issuer), ("stranger", &other_issuer)]
    {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.signed_by(&key, issuer).expect("signed");
        made.push(write(&format!("{name}.pem"), certificate.pem()));
        made.push(write(&format!("{name}.key"), key.serialize_pem()));
    }
    Certificates { ca: write("ca.pem", ca), server_certificate: made[0].clone(), server_key: made[1].clone() }
}
