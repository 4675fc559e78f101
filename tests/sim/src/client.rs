//! People: they create sessions through any unit, repeat what was not answered when they gave a key, open a socket,
//! signal without ever repeating a frame, watch, leave, come back, delete.

use fanlight_api::SessionId;

use crate::{
    engine::StreamerTimer,
    gateway::Post,
    note,
    world::{Message, Pid, Timer, World},
};

/// How long a caller waits for an answer.
const ANSWER_MS: u64 = 8000;
/// How long a client waits for media before it joins again.
const SIGNALLING_MS: u64 = 300_000;

/// What a caller asks of a unit.
#[derive(Clone, Debug)]
pub enum Ask {
    /// A session.
    Create(Post),
    /// Another generation.
    Join(SessionId),
    /// A signalling socket.
    Open {
        /// Of which session.
        session: SessionId,
        /// The token's generation.
        generation: u64,
        /// The socket.
        socket: u64,
    },
    /// Its end.
    Delete {
        /// Which.
        session: SessionId,
        /// Also when its agent is silent.
        force: bool,
    },
}

/// What a unit answers.
#[derive(Clone, Debug)]
pub enum Tell {
    /// 201.
    Created {
        /// The session.
        session: SessionId,
        /// The token's generation.
        generation: u64,
    },
    /// 200.
    Joined {
        /// The token's generation.
        generation: u64,
    },
    /// The socket is open.
    Opened {
        /// For which generation.
        generation: u64,
    },
    /// It ends, or has ended.
    Deleted,
    /// Nobody can take it.
    Refused,
    /// There is no such session, or it is over.
    Gone,
    /// Something is broken; it may work later.
    Failed,
}

/// How far a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Waits for the answer to a create.
    Creating,
    /// Has a session and thinks.
    Owner,
    /// Waits for the answer to a join.
    Joining,
    /// Waits for its socket.
    Opening,
    /// Its socket is open.
    Signalling,
    /// Media flows.
    Watching,
    /// Done.
    Away,
}

/// One person.
#[derive(Clone, Debug)]
pub struct Client {
    /// How far.
    pub stage: Stage,
    /// Of which session.
    pub session: Option<SessionId>,
    /// Of which generation.
    pub generation: u64,
    post: Option<Post>,
    call: u64,
    /// The open socket.
    pub socket: Option<u64>,
    sent: u64,
    taken: u64,
    /// Where the media comes from.
    pub media: Option<(usize, u64)>,
    tries: u32,
    /// Never opens a socket.
    shy: bool,
}

/// Timers of a client.
#[derive(Clone, Debug)]
pub enum ClientTimer {
    /// No answer came.
    Late(u64),
    /// Time to go on.
    GoOn(Stage),
    /// Signalling took too long.
    GiveUp(u64),
    /// It has seen enough.
    Leave(u64),
    /// Create again.
    Create,
}

impl World {
    /// A person who wants a session.
    pub fn person_creates(&mut self) {
        let client = self.clients.len();
        let key = self.rng.chance(0.6).then(|| format!("key{client}"));
        let post = Post {
            key,
            joinable: self.rng.chance(0.7),
            ephemeral: self.rng.chance(0.8),
            idle_time_min: [0, 1, 30][self.rng.below(3) as usize],
        };
        let shy = self.rng.chance(0.1);
        self.clients.push(Client {
            stage: Stage::Creating,
            session: None,
            generation: 0,
            post: Some(post),
            call: 0,
            socket: None,
            sent: 0,
            taken: 0,
            media: None,
            tries: 0,
            shy,
        });
        self.client_creates(client);
    }

    /// A person who wants into a session.
    pub fn person_joins(&mut self, session: SessionId) {
        let client = self.clients.len();
        self.clients.push(Client {
            stage: Stage::Joining,
            session: Some(session),
            generation: 0,
            post: None,
            call: 0,
            socket: None,
            sent: 0,
            taken: 0,
            media: None,
            tries: 0,
            shy: false,
        });
        self.client_joins(client);
    }

    fn client_asks(&mut self, client: usize, ask: Ask) {
        let call = self.fresh();
        let unit = self.rng.below(self.units.len() as u64) as usize;
        let (pid, to) = (Pid::Client(client), Pid::Gateway(unit));
        self.clients[client].call = call;
        if let Ask::Open { session, generation, .. } = ask {
            let socket = self.open_socket(unit, client);
            let ask = Ask::Open { session, generation, socket };
            self.clients[client].socket = Some(socket);
            self.http(pid, to, Message::Ask(call, Box::new(ask)));
        } else {
            self.http(pid, to, Message::Ask(call, Box::new(ask)));
        }
        self.timer_in(pid, ANSWER_MS, Timer::Client(ClientTimer::Late(call)));
    }

    fn client_creates(&mut self, client: usize) {
        let Some(post) = self.clients[client].post.clone() else { return };
        self.clients[client].stage = Stage::Creating;
        self.client_asks(client, Ask::Create(post));
    }

    fn client_joins(&mut self, client: usize) {
        let Some(session) = self.clients[client].session.clone() else { return };
        self.clients[client].stage = Stage::Joining;
        self.client_asks(client, Ask::Join(session));
    }

    fn client_opens(&mut self, client: usize) {
        let one = &mut self.clients[client];
        let Some(session) = one.session.clone() else { return };
        one.stage = Stage::Opening;
        let generation = one.generation;
        self.client_asks(client, Ask::Open { session, generation, socket: 0 });
    }

    fn client_again(&mut self, client: usize) {
        let one = &mut self.clients[client];
        one.tries += 1;
        if one.tries > 20 && !self.calm {
            return self.client_away(client);
        }
        self.clients[client].stage = Stage::Joining;
        let pause = self.rng.between(200, 3000);
        self.timer_in(Pid::Client(client), pause, Timer::Client(ClientTimer::GoOn(Stage::Joining)));
    }

    fn client_away(&mut self, client: usize) {
        self.clients[client].stage = Stage::Away;
        if let Some(socket) = self.clients[client].socket.take() {
            self.close_socket(socket, false);
        }
    }

    /// Something reached a client.
    pub fn client_message(&mut self, client: usize, message: Message) {
        match message {
            Message::Tell(call, tell) => {
                if self.clients[client].call == call {
                    self.clients[client].call = 0;
                    self.client_told(client, Some(*tell));
                }
            }
            Message::SocketDown(socket, text) => {
                if self.clients[client].socket == Some(socket)
                    && self.clients[client].stage == Stage::Signalling
                {
                    self.client_frame(client, &text);
                }
            }
            Message::SocketClosed(socket) => {
                if self.clients[client].socket == Some(socket) {
                    self.clients[client].socket = None;
                    if self.clients[client].stage == Stage::Signalling {
                        self.client_again(client);
                    }
                }
            }
            _ => {}
        }
    }

    fn client_told(&mut self, client: usize, tell: Option<Tell>) {
        let pid = Pid::Client(client);
        let stage = self.clients[client].stage;
        match (stage, tell) {
            (Stage::Creating, Some(Tell::Created { session, generation })) => {
                if let Some(key) = self.clients[client].post.as_ref().and_then(|post| post.key.clone()) {
                    self.judge_repeat(&key, &session);
                }
                let one = &mut self.clients[client];
                one.session = Some(session);
                one.generation = generation;
                one.stage = Stage::Owner;
                if !one.shy {
                    let think = self.rng.below(3000);
                    self.timer_in(pid, think, Timer::Client(ClientTimer::GoOn(Stage::Owner)));
                }
            }
            (Stage::Creating, None | Some(Tell::Failed)) => {
                let has_key = self.clients[client].post.as_ref().is_some_and(|post| post.key.is_some());
                if has_key {
                    let pause = self.rng.between(100, 3000);
                    self.timer_in(pid, pause, Timer::Client(ClientTimer::Create));
                } else {
                    self.client_away(client);
                }
            }
            (Stage::Joining, Some(Tell::Joined { generation })) => {
                self.clients[client].generation = generation;
                self.client_opens(client);
            }
            (Stage::Opening, Some(Tell::Opened { generation })) => {
                if generation == self.clients[client].generation {
                    self.client_signals(client);
                }
            }
            (Stage::Opening | Stage::Joining, None | Some(Tell::Failed)) => {
                if let Some(socket) = self.clients[client].socket.take() {
                    self.close_socket(socket, false);
                }
                self.client_again(client);
            }
            (Stage::Creating | Stage::Opening | Stage::Joining, _) => self.client_away(client),
            _ => {}
        }
    }

    fn client_signals(&mut self, client: usize) {
        let one = &mut self.clients[client];
        one.stage = Stage::Signalling;
        one.sent = 0;
        one.taken = 0;
        let generation = one.generation;
        self.client_sends(client);
        let give_up = ClientTimer::GiveUp(generation);
        self.timer_in(Pid::Client(client), SIGNALLING_MS, Timer::Client(give_up));
    }

    fn client_sends(&mut self, client: usize) {
        let one = &mut self.clients[client];
        let Some(socket) = one.socket else { return };
        let text = format!("c:{}:{}", one.generation, one.sent);
        one.sent += 1;
        self.on_socket(socket, true, text);
    }

    fn client_frame(&mut self, client: usize, text: &str) {
        if text.starts_with("error") {
            if let Some(socket) = self.clients[client].socket.take() {
                self.close_socket(socket, false);
            }
            return self.client_again(client);
        }
        let one = &mut self.clients[client];
        let wanted = one.taken;
        one.taken += 1;
        if text != format!("i:{}:{wanted}", one.generation) {
            let text = format!("client {client} got frame {text:?} where number {wanted} was due");
            return self.violate(text);
        }
        if wanted == 0 {
            // The offer is answered, then a candidate follows.
            self.client_sends(client);
            self.client_sends(client);
        }
    }

    /// Time passed for a client.
    pub fn client_timer(&mut self, client: usize, timer: ClientTimer) {
        match timer {
            ClientTimer::Late(call) => {
                if self.clients[client].call == call {
                    self.clients[client].call = 0;
                    self.client_told(client, None);
                }
            }
            ClientTimer::GoOn(stage) => match (stage, self.clients[client].stage) {
                (Stage::Owner, Stage::Owner) => self.client_opens(client),
                (Stage::Joining, Stage::Joining) if self.clients[client].call == 0 => {
                    self.client_joins(client)
                }
                _ => {}
            },
            ClientTimer::Create => {
                if self.clients[client].stage == Stage::Creating {
                    self.client_creates(client);
                }
            }
            ClientTimer::GiveUp(generation) => {
                let one = &self.clients[client];
                if one.stage == Stage::Signalling && one.generation == generation {
                    if let Some(session) = one.session.clone() {
                        self.judge_waited(client, &session);
                    }
                    self.client_away(client);
                }
            }
            ClientTimer::Leave(generation) => {
                let one = &self.clients[client];
                if one.stage == Stage::Watching && one.generation == generation && !self.calm {
                    self.client_leaves(client);
                }
            }
        }
    }

    fn client_leaves(&mut self, client: usize) {
        let one = &mut self.clients[client];
        one.stage = Stage::Away;
        let generation = one.generation;
        if let Some((cluster, number)) = one.media.take() {
            note!(self, "client {client} leaves");
            // Mostly in good order; else the streamer waits for it a while.
            let delay = if self.rng.chance(0.7) { 10 } else { 30_000 };
            let left = Timer::Streamer(StreamerTimer::Left(generation));
            self.timer_in(Pid::Streamer(cluster, number), delay, left);
        }
        if let Some(session) = self.clients[client].session.clone() {
            match self.rng.below(4) {
                0 => self.person_deletes(session),
                1 => self.client_again(client),
                _ => {}
            }
        }
    }

    /// Somebody asks for the end of a session.
    pub fn person_deletes(&mut self, session: SessionId) {
        let force = self.rng.chance(0.15);
        let client = self.clients.len();
        self.clients.push(Client {
            stage: Stage::Away,
            session: Some(session.clone()),
            generation: 0,
            post: None,
            call: 0,
            socket: None,
            sent: 0,
            taken: 0,
            media: None,
            tries: 0,
            shy: true,
        });
        self.client_asks(client, Ask::Delete { session, force });
    }

    // --- media, which no program but the streamer carries ---------------------------------------------------

    /// The client with this generation of a session.
    pub fn client_of(&self, session: &SessionId, generation: u64) -> Option<usize> {
        self.clients.iter().position(|client| {
            client.session.as_ref() == Some(session)
                && client.generation == generation
                && client.stage == Stage::Signalling
        })
    }

    /// Media reaches the client. False: it is not there any more.
    pub fn client_gets_media(
        &mut self,
        client: usize,
        session: &SessionId,
        generation: u64,
        cluster: usize,
        number: u64,
    ) -> bool {
        let one = &mut self.clients[client];
        if one.session.as_ref() != Some(session)
            || one.generation != generation
            || one.stage != Stage::Signalling
        {
            return false;
        }
        one.stage = Stage::Watching;
        one.media = Some((cluster, number));
        one.tries = 0;
        note!(self, "client {client} watches {session}");
        // Clients of the original close their socket now.
        if let Some(socket) = self.clients[client].socket.take() {
            self.close_socket(socket, false);
        }
        let watches = self.rng.between(3000, 90_000);
        self.timer_in(Pid::Client(client), watches, Timer::Client(ClientTimer::Leave(generation)));
        true
    }

    /// The streamer is gone, or serves somebody else.
    pub fn client_lost_media(&mut self, client: usize, session: &SessionId, generation: u64) {
        let one = &mut self.clients[client];
        if one.session.as_ref() == Some(session) && one.generation == generation && one.media.is_some() {
            one.media = None;
            one.stage = Stage::Away;
        }
    }
}
