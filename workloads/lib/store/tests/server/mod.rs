//! Real `etcd` members on free ports of loopback, ended with their handles.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use etcd_client::Client;
use fanlight_store::{Handle, StoreConfig, open};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

pub const PATIENCE: Duration = Duration::from_secs(30);

/// A cluster of one or more members in a folder of its own.
pub struct Cluster {
    pub members: Vec<Member>,
    _folder: tempfile::TempDir,
}

/// A member that can be killed and started again at the same address.
pub struct Member {
    /// `127.0.0.1:PORT`.
    pub address: String,
    tls: bool,
    log: PathBuf,
    arguments: Vec<String>,
    child: Option<Child>,
}

impl Cluster {
    /// Members that run and do not yet answer. Arguments are for each of them; any certificate among them means TLS.
    pub fn start(count: usize, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let tls = arguments.contains(&"--cert-file");
        let scheme = if tls { "https" } else { "http" };
        // All at the same time, so that no port is given out twice.
        let free: Vec<TcpListener> =
            (0..2 * count).map(|_| TcpListener::bind(("127.0.0.1", 0)).expect("a free port")).collect();
        let addresses: Vec<String> =
            free.iter().map(|free| free.local_addr().expect("bound").to_string()).collect();
        drop(free);
        let (clients, peers) = addresses.split_at(count);
        let initial: Vec<String> =
            peers.iter().enumerate().map(|(n, peer)| format!("m{n}=http://{peer}")).collect();
        let mut members = Vec::new();
        for (n, (address, peer)) in clients.iter().zip(peers).enumerate() {
            let data = folder.path().join(format!("m{n}"));
            let mut all: Vec<String> = [
                ("--name", format!("m{n}")),
                ("--data-dir", data.to_str().expect("text").to_owned()),
                ("--listen-client-urls", format!("{scheme}://{address}")),
                ("--advertise-client-urls", format!("{scheme}://{address}")),
                ("--listen-peer-urls", format!("http://{peer}")),
                ("--initial-advertise-peer-urls", format!("http://{peer}")),
                ("--initial-cluster", initial.join(",")),
                ("--initial-cluster-state", "new".to_owned()),
                ("--initial-cluster-token", peers[0].clone()),
                ("--logger", "zap".to_owned()),
            ]
            .into_iter()
            .flat_map(|(name, value)| [name.to_owned(), value])
            .collect();
            all.extend(arguments.iter().map(|text| (*text).to_owned()));
            let log = folder.path().join(format!("m{n}.log"));
            let mut member = Member { address: address.clone(), tls, log, arguments: all, child: None };
            member.start();
            members.push(member);
        }
        Self { members, _folder: folder }
    }

    /// Settings of a program that uses all members.
    pub fn config(&self) -> StoreConfig {
        let addresses: Vec<&str> = self.members.iter().map(|member| member.address.as_str()).collect();
        let scheme = if self.members[0].tls { "etcds" } else { "etcd" };
        StoreConfig::at(format!("{scheme}://{}", addresses.join(",")))
    }

    /// A store on all members, once there is a leader.
    pub async fn store(&self) -> Handle {
        self.open(&self.config()).await
    }

    /// A store with these settings, as soon as it can be opened.
    pub async fn open(&self, config: &StoreConfig) -> Handle {
        let start = Instant::now();
        loop {
            match open(config).await {
                Ok(store) => return store,
                Err(error) if start.elapsed() > PATIENCE => {
                    let logs: Vec<String> = self.members.iter().map(Member::end_of_log).collect();
                    panic!("etcd does not come up: {error}\n{}", logs.join("\n"))
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// A client of one member without TLS.
    pub async fn client(&self, member: usize) -> Client {
        Client::connect([format!("http://{}", self.members[member].address)], None).await.expect("a client")
    }

    /// Index of the leader.
    pub async fn leader(&self) -> usize {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            for n in (0..self.members.len()).filter(|n| self.members[*n].child.is_some()) {
                let mut client = self.client(n).await;
                let status = tokio::time::timeout(Duration::from_secs(2), client.status()).await;
                if let Ok(Ok(status)) = status
                    && status.leader() != 0
                    && status.header().map(|header| header.member_id()) == Some(status.leader())
                {
                    return n;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("there is no leader");
    }
}

impl Member {
    /// Has it listen for clients somewhere else from its next start on.
    pub fn move_to(&mut self, address: &str) {
        for argument in &mut self.arguments {
            *argument = argument.replace(&self.address, address);
        }
        self.address = address.to_owned();
    }

    /// As `move_to`.
    pub fn move_to_a_free_port(&mut self) {
        let free = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        self.move_to(&free.local_addr().expect("bound").to_string());
    }

    pub fn start(&mut self) {
        self.kill();
        let log = fs::OpenOptions::new().create(true).append(true).open(&self.log).expect("a log");
        let child = Command::new("etcd")
            .args(&self.arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("etcd is needed for this test (Debian: etcd-server): {error}"));
        self.child = Some(child);
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("killed");
            child.wait().expect("ended");
        }
    }

    /// Sends a signal by its name: `STOP` makes it hang, `CONT` lets it go on.
    pub fn signal(&self, name: &str) {
        let child = self.child.as_ref().expect("it runs");
        let status = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status();
        assert!(status.expect("the shell's kill is there as a program").success(), "kill -{name}");
    }

    fn end_of_log(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}

/// One member for all tests of this program that do not mind the others: started by the first, ended by the last that
/// uses it at the same time, also when that one panics.
pub fn shared() -> Arc<Cluster> {
    static SHARED: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let cluster = Arc::new(Cluster::start(1, &[]));
        *shared = Arc::downgrade(&cluster);
        cluster
    })
}

/// Makes `ca.pem`, `server.pem`, `client.pem`, their keys, `other-ca.pem`, and `stranger.pem` with its key, which comes
/// from there.
pub fn certificates(folder: &Path) {
    let write = |name: &str, text: String| fs::write(folder.join(name), text).expect("written");
    let authority = |name: &str| {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.self_signed(&key).expect("signed");
        (Issuer::new(params, key), certificate.pem())
    };
    let (ours, ca) = authority("the authority of the test");
    let (others, other_ca) = authority("another authority");
    write("ca.pem", ca);
    write("other-ca.pem", other_ca);
    for (name, issuer) in [("server", &ours), ("client", &ours), ("stranger", &others)] {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, name);
        // Etcd's gateway is a client of the server with the server's certificate.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, issuer).expect("signed");
        write(&format!("{name}.pem"), certificate.pem());
        write(&format!("{name}.key"), key.serialize_pem());
    }
}
