-- Run once by the image, as the superuser, when the data folder is new: who owns what. The password of both users is the
-- one that only this container's secret file holds.
\set password `cat "$FINPRO_PASSWORD_FILE"`

create role finpro login password :'password';
create database finpro owner finpro;

create role airflow login password :'password';
create database airflow owner airflow;
