// SPDX-License-Identifier: GPL-2.0-only

//! Memory of a file in user space (FUSE), which is never served.
//!
//! Other than with userfaultfd, who waits for it can't be killed once its server was asked for it.

use crate::{OtherProcess, Skip};
use anyhow::{Context as _, Result, ensure};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation,
    INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, Request,
};
use rustix::{
    io::Errno as Failed,
    mount::{UnmountFlags, unmount},
    process::{Signal, set_parent_process_death_signal},
};
use std::{
    ffi::OsStr,
    fs::{File, remove_dir},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, UNIX_EPOCH},
};
use tempfile::TempDir;
use vfio_client::Memory;

/// The attributes of what is asked for stay as they are.
const FOR_LONG: Duration = Duration::from_secs(3600);

/// The only file.
const FILE: INodeNo = INodeNo(2);
const NAME: &str = "unserved";

/// A file system with a file whose contents nobody ever gets.
struct Server {
    len: u64,
    asked: Mutex<Sender<()>>,
    /// A reply that is dropped answers with an error.
    withheld: Mutex<Vec<ReplyData>>,
}

impl Server {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let (kind, size) = match ino {
            FILE => (FileType::RegularFile, self.len),
            _ => (FileType::Directory, 0),
        };
        FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Server {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == NAME {
            true => reply.entry(&FOR_LONG, &self.attributes(FILE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&FOR_LONG, &self.attributes(ino));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _offset: u64,
        _size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (Ok(mut withheld), Ok(asked)) = (self.withheld.lock(), self.asked.lock()) else {
            return;
        };
        withheld.push(reply);
        let _ = asked.send(());
    }
}

/// Skips the scenario if the kernel has no FUSE.
pub fn needs_fuse() -> Result<()> {
    ensure!(Path::new("/dev/fuse").exists(), Skip("this kernel has no FUSE".into()));
    Ok(())
}

/// Serves such a file in this process.
pub struct FuseServer {
    directory: TempDir,
    asked: Receiver<()>,
    session: Option<BackgroundSession>,
}

impl FuseServer {
    /// One with a file of so many bytes.
    pub fn new(len: u64) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let (asks, asked) = channel();
        let server = Server { len, asked: Mutex::new(asks), withheld: Mutex::default() };
        let session = fuser::spawn_mount(server, directory.path(), &Config::default())
            .context("mount a file system in user space")?;
        Ok(Self { directory, asked, session: Some(session) })
    }

    /// Where it is mounted.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Waits until somebody waits for the contents.
    pub fn wait_until_asked(&self) -> Result<()> {
        Ok(self.asked.recv()?)
    }
}

impl Drop for FuseServer {
    fn drop(&mut self) {
        let aborted = unmount_fuse(self.directory());
        let ended = self.session.take().map(BackgroundSession::join);
        debug_assert!(aborted.is_ok() && ended.is_some_and(|ended| ended.is_ok()));
    }
}

/// Memory of the first bytes of the file of a server, which belongs to this process alone.
pub fn unserved_memory(directory: &Path, len: u64) -> Result<Memory> {
    let path = directory.join(NAME);
    let file = File::options().read(true).write(true).open(&path).context("open a file of FUSE")?;
    Ok(Memory::of_served_file(&file, len as usize)?)
}

/// Ends a file system in user space, as an administrator would: who waits for it fails.
pub fn unmount_fuse(directory: &Path) -> Result<()> {
    match unmount(directory, UnmountFlags::FORCE | UnmountFlags::DETACH) {
        // It has ended before.
        Ok(()) | Err(Failed::INVAL) => Ok(()),
        Err(errno) => Err(errno).context("unmount a file system by force"),
    }
}

/// Serve a file by FUSE whose contents nobody gets; say where it is, and when somebody asks
#[derive(clap::Args)]
pub struct ServeArguments {
    /// Its size
    bytes: u64,
}

/// Runs the command.
pub fn serve(arguments: &ServeArguments) -> Result<ExitCode> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("prctl PR_SET_PDEATHSIG")?;
    let server = FuseServer::new(arguments.bytes)?;
    println!("{}", server.directory().display());
    loop {
        server.wait_until_asked()?;
        println!("somebody asks");
    }
}

/// While this exists, who accesses memory of a file waits for another process, and can't be killed.
///
/// The process whose memory it is could not serve it: who waits may hold its `mmap_lock`.
pub struct ServedElsewhere {
    server: OtherProcess,
    directory: PathBuf,
}

impl ServedElsewhere {
    /// With memory of so many bytes. Skips the scenario if the kernel has no FUSE.
    pub fn new(len: u64) -> Result<(Self, Memory)> {
        needs_fuse()?;
        let (server, directory) = OtherProcess::start(&["serve", &len.to_string()])?;
        let this = Self { server, directory: directory.into() };
        let memory = unserved_memory(&this.directory, len)?;
        Ok((this, memory))
    }

    /// Waits until somebody waits for the memory.
    pub fn wait_until_asked(&mut self) -> Result<()> {
        self.server.line().map(drop)
    }
}

impl Drop for ServedElsewhere {
    fn drop(&mut self) {
        let _ = self.server.kill(Duration::from_secs(20));
        let gone = unmount_fuse(&self.directory).is_ok() && remove_dir(&self.directory).is_ok();
        debug_assert!(gone);
    }
}
