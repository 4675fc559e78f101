//! `fanlight file …`: files in and out of running instances, through programs that every instance has: `sh`, `cat` and
//! `tar`. Paths are arguments of theirs and never part of a script.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use fanlight_client::AmsClient;
use tokio::sync::mpsc;

use super::{cli::FileCommand, exec::piped, remotes::client};

/// Chunks that wait for the connection.
const QUEUE: usize = 8;
const CHUNK_BYTES: usize = 64 * 1024;
/// Takes a file from standard input to `$1`, or into it under the name `$2` where it is a folder, with mode `$3`. It
/// appears as a whole or not at all.
const TAKE_FILE: &str = "set -e; to=$1; if [ -d \"$to\" ]; then to=$to/$2; fi; part=$to.part.$$; \
    trap 'rm -f -- \"$part\"' EXIT; cat > \"$part\"; chmod \"$3\" \"$part\"; mv -- \"$part\" \"$to\"";
/// Takes a folder as tar from standard input to `$1`, or below it under the name `$2` where it is there already.
const TAKE_FOLDER: &str =
    "set -e; to=$1; if [ -d \"$to\" ]; then to=$to/$2; fi; mkdir -p -- \"$to\"; exec tar -C \"$to\" -xf -";

/// `fanlight file …`
///
/// # Errors
/// The instance does not run, or a file cannot be read or written on either side.
pub async fn file(command: FileCommand) -> Result<()> {
    match command {
        FileCommand::Push { target, file, instance, path } => {
            push(&client(&target)?, &file, &instance, &path).await
        }
        FileCommand::Pull { target, instance, path, file, recursive } => {
            let ams = client(&target)?;
            if recursive {
                pull_folder(&ams, &instance, &path, &file).await
            } else {
                pull(&ams, &instance, &path, &file).await
            }
        }
    }
}

async fn push(ams: &AmsClient, file: &Path, instance: &str, path: &str) -> Result<()> {
    let (chunks, receiver) = mpsc::channel(QUEUE);
    let file = file.to_owned();
    let name = if file.as_os_str() == "-" { "stdin".to_owned() } else { name_of(&file)? };
    let is_folder = file.is_dir();
    let mode = mode_of(&file);
    // Opened before anything is asked of the instance, so that a wrong name here changes nothing there.
    let source: Option<Box<dyn Read + Send>> = match (is_folder, file.as_os_str() == "-") {
        (true, _) => None,
        (false, true) => Some(Box::new(io::stdin())),
        (false, false) => {
            Some(Box::new(File::open(&file).with_context(|| format!("reading {}", file.display()))?))
        }
    };
    let what = file.display().to_string();
    let reading = std::thread::spawn(move || {
        let mut sink = Sink(chunks);
        match source {
            Some(mut source) => copy(&mut source, &mut sink),
            None => {
                let mut builder = tar::Builder::new(io::BufWriter::with_capacity(CHUNK_BYTES, sink));
                builder.follow_symlinks(false);
                builder.append_dir_all(".", &file).and_then(|()| builder.into_inner()?.flush())
            }
        }
    });
    let command: &[&str] = match is_folder {
        true => &["sh", "-c", TAKE_FOLDER, "sh", path, &name],
        false => &["sh", "-c", TAKE_FILE, "sh", path, &name, &mode],
    };
    let status = piped(ams, instance, command, receiver, |_| Ok(())).await?;
    if status != 0 {
        bail!("{path} in {instance} cannot be written (status {status})");
    }
    // It has ended: the program took everything that there was.
    match tokio::task::spawn_blocking(move || reading.join()).await {
        Ok(Ok(done)) => done.with_context(|| format!("reading {what}")),
        _ => bail!("reading {what} failed"),
    }
}

async fn pull(ams: &AmsClient, instance: &str, path: &str, file: &Path) -> Result<()> {
    let command = ["cat", "--", path];
    let complain = |status| anyhow::anyhow!("{path} in {instance} cannot be read (status {status})");
    if file.as_os_str() == "-" {
        let out = |bytes: &[u8]| io::stdout().lock().write_all(bytes).context("printing the file");
        return match piped(ams, instance, &command, nothing(), out).await? {
            0 => io::stdout().flush().context("printing the file"),
            status => Err(complain(status)),
        };
    }
    let place = if file.is_dir() { file.join(name_of(Path::new(path))?) } else { file.to_owned() };
    let folder = place.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut part = tempfile::NamedTempFile::new_in(folder)
        .with_context(|| format!("writing into {}", folder.display()))?;
    let status = piped(ams, instance, &command, nothing(), |bytes| {
        part.write_all(bytes).with_context(|| format!("writing {}", place.display()))
    })
    .await?;
    if status != 0 {
        return Err(complain(status));
    }
    part.persist(&place).with_context(|| format!("writing {}", place.display()))?;
    Ok(())
}

async fn pull_folder(ams: &AmsClient, instance: &str, path: &str, file: &Path) -> Result<()> {
    if file.as_os_str() == "-" {
        bail!("a folder cannot go to standard output; name a folder here");
    }
    let place = if file.is_dir() { file.join(name_of(Path::new(path))?) } else { file.to_owned() };
    std::fs::create_dir_all(&place).with_context(|| format!("making {}", place.display()))?;
    let (sender, receiver) = std::sync::mpsc::sync_channel::<Vec<u8>>(QUEUE);
    let into = place.clone();
    // What comes out of an instance is somebody else's: unpacking lets nothing leave the folder.
    let unpacking = std::thread::spawn(move || {
        let mut archive =
            tar::Archive::new(Source { chunks: receiver, current: io::Cursor::new(Vec::new()) });
        archive.set_preserve_ownerships(false);
        archive.unpack(&into)
    });
    let status = piped(ams, instance, &["tar", "-C", path, "-cf", "-", "."], nothing(), |bytes| {
        // Whoever unpacks has stopped because of an error, which is told below.
        tokio::task::block_in_place(|| sender.send(bytes.to_vec())).context("unpacking the folder")
    })
    .await;
    drop(sender);
    let unpacked = tokio::task::spawn_blocking(move || unpacking.join()).await;
    match unpacked {
        Ok(Ok(done)) => done.with_context(|| format!("unpacking into {}", place.display()))?,
        _ => bail!("unpacking into {} failed", place.display()),
    }
    match status? {
        0 => Ok(()),
        status => bail!("{path} in {instance} cannot be read (status {status})"),
    }
}

fn nothing() -> mpsc::Receiver<Bytes> {
    mpsc::channel(1).1
}

fn name_of(path: &Path) -> Result<String> {
    let whole: PathBuf = if path.file_name().is_some() {
        path.to_owned()
    } else {
        path.canonicalize().with_context(|| format!("finding {}", path.display()))?
    };
    let name = whole.file_name().with_context(|| format!("{} has no name of its own", path.display()))?;
    name.to_str().map(str::to_owned).with_context(|| format!("the name {} is not UTF-8", path.display()))
}

/// The mode of a file as octal digits.
fn mode_of(file: &Path) -> String {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(file).map_or(0o644, |about| about.permissions().mode() & 0o777);
    format!("{mode:o}")
}

fn copy(source: &mut dyn Read, sink: &mut Sink) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => sink.write_all(&buffer[..read])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Writes go to the connection, at its pace.
struct Sink(mpsc::Sender<Bytes>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the program in the instance takes no more");
        self.0.blocking_send(Bytes::copy_from_slice(bytes)).map_err(gone)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads what came from the connection.
struct Source {
    chunks: std::sync::mpsc::Receiver<Vec<u8>>,
    current: io::Cursor<Vec<u8>>,
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.current.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            match self.chunks.recv() {
                Ok(chunk) => self.current = io::Cursor::new(chunk),
                Err(_) => return Ok(0),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn take(script: &str, arguments: &[&str], input: &[u8]) -> bool {
        let mut child = Command::new("sh")
            .args(["-c", script, "sh"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell is there");
        // A script that refuses before it reads closes its input, which is fine.
        let _ = child.stdin.take().expect("piped").write_all(input);
        child.wait().expect("ended").success()
    }

    #[test]
    fn files_arrive_whole_under_odd_names_and_with_their_mode() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().expect("temporary folder");
        let text = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
        let odd = text("a b'$(x)\"");
        assert!(take(TAKE_FILE, &[&odd, "unused", "640"], b"content"));
        assert_eq!(std::fs::read(&odd).expect("there"), b"content");
        assert_eq!(std::fs::metadata(&odd).expect("there").permissions().mode() & 0o777, 0o640);
        assert!(take(TAKE_FILE, &[folder.path().to_str().expect("UTF-8"), "named", "600"], b"x"));
        assert_eq!(std::fs::read(text("named")).expect("there"), b"x");
        assert!(!take(TAKE_FILE, &[&text("none/below"), "n", "600"], b"x"), "there is no such folder");
        let left: Vec<_> = std::fs::read_dir(folder.path()).expect("readable").collect();
        assert_eq!(left.len(), 2, "nothing half is left: {left:?}");
    }

    #[test]
    fn folders_arrive_below_a_folder_that_is_there_or_as_a_new_one() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let mut builder = tar::Builder::new(Vec::new());
        let source = folder.path().join("source");
        std::fs::create_dir_all(source.join("sub")).expect("made");
        std::fs::write(source.join("sub/file"), "x").expect("written");
        builder.append_dir_all(".", &source).expect("packed");
        let bytes = builder.into_inner().expect("whole");
        let place = folder.path().join("place");
        let to = place.to_str().expect("UTF-8");
        assert!(take(TAKE_FOLDER, &[to, "source"], &bytes));
        assert_eq!(std::fs::read(place.join("sub/file")).expect("there"), b"x");
        assert!(take(TAKE_FOLDER, &[to, "source"], &bytes));
        assert_eq!(std::fs::read(place.join("source/sub/file")).expect("there"), b"x");
    }

    #[test]
    fn names_come_from_paths_of_any_shape() {
        assert_eq!(name_of(Path::new("/a/b")).expect("named"), "b");
        assert_eq!(name_of(Path::new("b/")).expect("named"), "b");
        assert!(name_of(Path::new("/")).is_err());
        assert!(!name_of(Path::new(".")).expect("a folder has a name").is_empty());
    }
}
