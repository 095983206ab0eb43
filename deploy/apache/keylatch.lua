-- The hook `keylatch`: asks the sidecar about a request. Needs Apache >= 2.4.57 and LuaSocket.
--
-- Whatever goes wrong in here is 503, and only what was allowed gets past `keylatch_closes`. Every
-- way out of a hook is a number: after anything else mod_lua never uses this Lua again, and the
-- requests that wait for one wait for ever.

local socket = require "socket"
local unix = require "socket.unix"

-- An address: LuaSocket would look a name up for as long as that takes.
local SIDECAR = "127.0.0.1:8700" -- or: "/run/keylatch/keylatch.sock"

-- What a request asks of its key. FULL is for everything that is not named here. Method and path
-- are compared as they came, letter by letter, so whatever is spelled another way (/v1/./emails,
-- //v1/emails, %2e) asks for FULL.
local PERMISSIONS = {
    ["POST /v1/emails"] = "SENDING",
    ["POST /v1/emails/batch"] = "SENDING",
}

-- Public: paths as they came, too.
local PUBLIC = {
    ["/healthz"] = true,
}

local PATIENCE_SECONDS = 1 -- the sidecar decides within 0.8 s; LuaSocket's own is 60 s

local IDENTITY = {
    "x-keylatch-key-id",
    "x-keylatch-key-name",
    "x-keylatch-organization-id",
    "x-keylatch-permission",
    "x-keylatch-environment",
}
local OF_REFUSALS = {"cache-control", "x-keylatch-error", "www-authenticate", "retry-after"}
local REFUSED = {[401] = true, [403] = true, [429] = true}

-- What is not the client's to say. The permission is decided by the method: no app shall take it
-- for another one. The key ends here: what the app never gets, it cannot log or leak; delete its
-- line if the app checks keys itself or has another use for the header.
local NOT_THE_CLIENTS = {
    ["authorization"] = true,
    ["x-http-method"] = true,
    ["x-http-method-override"] = true,
    ["x-method-override"] = true,
    ["x-forwarded-for"] = true,
    ["x-forwarded-host"] = true,
    ["x-forwarded-proto"] = true,
    ["x-forwarded-server"] = true,
}

local ALLOWED = {}
local UNAVAILABLE = {
    status = 503,
    fields = {
        ["content-type"] = "application/json",
        ["cache-control"] = "no-store",
        ["x-keylatch-error"] = "unavailable",
        ["retry-after"] = "1",
    },
    body = '{"error":"unavailable","error_description":'
        .. '"The API key could not be checked; try again in a moment"}',
}

local kept -- this Lua's connection to the sidecar, between two requests

local function wait_until(deadline, connection)
    connection:settimeout(math.max(0, deadline - socket.gettime()), "t")
end

local function closing(connection) -- LuaSocket's `try`: a fault also ends the connection
    return socket.newtry(function() connection:close() end)
end

local dial = socket.protect(function(deadline)
    local host, port = SIDECAR:match("^(.*):(%d+)$")
    local connection = host and socket.tcp() or unix.stream()
    local try = closing(connection)
    wait_until(deadline, connection)
    try(connection:connect(host or SIDECAR, port))
    return connection
end)

-- Keeps the connection only after an answer that was read to its end: what is left of one would be
-- the answer to somebody else's question.
local exchange = socket.protect(function(connection, question, deadline)
    local try = closing(connection)
    local function read(what)
        wait_until(deadline, connection)
        return try(connection:receive(what))
    end
    wait_until(deadline, connection)
    try(connection:send(question))
    local status = try(read("*l"):match("^HTTP/1%.1 (%d%d%d) "), "no HTTP")
    local fields = {}
    for line in read, "*l" do
        if line == "" then
            break
        end
        local name, value = line:match("^([^%s:]+):%s*(.-)%s*$")
        try(name and not fields[name:lower()], "a header that is broken or comes twice")
        fields[name:lower()] = value
    end
    local length = try((fields["content-length"] or ""):match("^%d+$"), "no length")
    local body = length:match("[1-9]") and read(tonumber(length)) or ""
    kept = connection
    return {status = tonumber(status), fields = fields, body = body}
end)

local function is_idle(connection) -- neither closed by the sidecar, nor with bytes nobody asked for
    wait_until(0, connection)
    local _, fault = connection:receive(1)
    return fault == "timeout"
end

local function ask(question)
    local deadline = socket.gettime() + PATIENCE_SECONDS
    local old = kept
    kept = nil
    if old and is_idle(old) then
        local answer, fault = exchange(old, question, deadline)
        if answer or fault == "timeout" then
            return answer, fault
        end -- closed under the question: once more, on a new one
    elseif old then
        old:close()
    end
    local connection, fault = dial(deadline)
    if not connection then
        return nil, fault
    end
    return exchange(connection, question, deadline)
end

local function question_about(r, path, authorization)
    local permission = PERMISSIONS[r.method .. " " .. path] or "FULL"
    local lines = {
        "GET /verify?permission=" .. permission .. " HTTP/1.1",
        "Host: keylatch",
        "X-Forwarded-Method: " .. r.method, -- for KEYLATCH_VERIFY_REQUEST=forwarded
        "X-Forwarded-Uri: " .. r.unparsed_uri,
    }
    if authorization then -- Apache joins two of them with a comma: the sidecar refuses that
        lines[#lines + 1] = "Authorization: " .. authorization
    end
    return table.concat(lines, "\r\n") .. "\r\n\r\n"
end

-- Many apps take X_Keylatch_Key_Id for X-Keylatch-Key-Id, so every spelling goes. Not with
-- mod_headers: it has no patterns.
local function clean(r)
    for name in pairs(r:headers_in_table()) do
        local folded = name:lower():gsub("[^a-z0-9]", "-")
        if folded:match("^x%-keylatch") or NOT_THE_CLIENTS[folded] then
            r.headers_in[name] = nil
        end
    end
    r.headers_in["X-Forwarded-Proto"] = r.is_https and "https" or "http"
end

-- Of `Connection` stays what is about the client's own connection. mod_proxy removes the headers it
-- names: `Connection: X-Keylatch-Key-Id` would make an anonymous request of an allowed one.
local function clean_connection(r)
    local tokens = {}
    for token in (r.headers_in["Connection"] or ""):lower():gmatch("[^%s,]+") do
        if token == "close" or token == "keep-alive" then
            tokens[#tokens + 1] = token
        end
    end
    if (r.headers_in["Upgrade"] or ""):lower() == "websocket" then
        tokens[#tokens + 1] = "upgrade"
    else
        r.headers_in["Upgrade"] = nil
    end
    r.headers_in["Connection"] = tokens[1] and table.concat(tokens, ", ")
end

-- A browser's question before a cross-origin request carries no key: the app answers it.
local function is_preflight(r)
    return r.method == "OPTIONS"
        and (r.headers_in["Origin"] or ""):match("^[^ ]+$")
        and (r.headers_in["Access-Control-Request-Method"] or ""):match("^[^ ]+$")
end

local function judge(r)
    local path = r.unparsed_uri:match("^[^?]*")
    local authorization = r.headers_in["Authorization"]
    clean(r)
    clean_connection(r)
    if PUBLIC[path] or is_preflight(r) then
        return ALLOWED
    end
    local answer, fault = ask(question_about(r, path, authorization))
    if not answer then
        error("the sidecar does not answer: " .. fault, 0)
    end
    if REFUSED[answer.status] and answer.fields["x-keylatch-error"] then
        return answer
    end
    assert(answer.status == 200, "the sidecar says neither yes nor no")
    for _, name in ipairs(IDENTITY) do
        r.headers_in[name] = assert(answer.fields[name], "that 200 is not keylatch's")
    end
    return ALLOWED
end

local function refuse(r, refusal) -- by ourselves: ErrorDocument has no headers
    r.status = refusal.status
    r.content_type = refusal.fields["content-type"] or "application/json"
    for _, name in ipairs(OF_REFUSALS) do
        r.err_headers_out[name] = refusal.fields[name]
    end
    r:puts(refusal.body)
    return apache2.DONE
end

function keylatch(r)
    local came_to_an_end, verdict = pcall(judge, r)
    if came_to_an_end and verdict == ALLOWED then
        r.notes["keylatch"] = "allowed"
        return apache2.DECLINED -- to refuse: other hooks still may
    end
    if not came_to_an_end then
        r:err("refused with 503: " .. tostring(verdict))
        verdict = UNAVAILABLE
    end
    return refuse(r, verdict)
end

-- Apache does not ask the first hook about all that it serves: not for an `ErrorDocument` that is a
-- path of the app, and `Satisfy Any` ignores what it said.
function keylatch_closes(r)
    if r.notes["keylatch"] == "allowed" then
        return apache2.DECLINED
    end
    r:err("refused with 500: keylatch was not asked, or not listened to")
    return 500
end
